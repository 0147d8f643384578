"The event array: what goes in comes out, and no slice loses or doubles an event."
import numpy as np, pytest
from mem_nb.events import (EVENT_DTYPE, check_events, event_rate, make_events, pack_events, sensor_extent, slice_by_count,
                           slice_by_time, unpack_events, windows_by_count, windows_by_time)

def random_events(n=2000, size=(180,240), span=300_000, seed=0):
    rng = np.random.default_rng(seed)
    return make_events(rng.integers(0,size[1],n), rng.integers(0,size[0],n), np.sort(rng.integers(0,span,n)), rng.integers(0,2,n))

# ---- the array
def test_dtype_is_tonics():
    assert EVENT_DTYPE == np.dtype([('x','<i2'), ('y','<i2'), ('t','<i8'), ('p','?')])

@pytest.mark.parametrize('p', [[True,False,True], [1,0,1], [1,-1,1], [1.,-1.,1.], np.uint8([1,0,1])])
def test_every_spelling_of_polarity_keeps_the_darker_events(p):
    "Defect 3: polarity 0/1 lost every darker event."
    assert make_events([1,2,3], [0,0,0], [0,1,2], p)['p'].tolist() == [True,False,True]

def test_float_columns_keep_integers_exact():
    t = [0., 2.**40+1, 2.**52-1]
    assert make_events([1.,2.,3.], [0.,0.,0.], t, [0,1,0])['t'].tolist() == [0, 2**40+1, 2**52-1]

@pytest.mark.parametrize('name,value', [('x',40_000), ('y',-40_000), ('t',np.nan), ('t',np.inf), ('p',3), ('p',np.nan)])
def test_impossible_values_are_named(name, value):
    columns = dict(x=[1,2], y=[1,2], t=[1,2], p=[0,1]); columns[name] = [columns[name][0], value]
    with pytest.raises(ValueError, match=f'{name} = .* at event 1'): make_events(**columns)

def test_check_lets_sound_events_through_unchanged():
    e = random_events()
    assert check_events(e, (180,240)) is e
    assert sensor_extent(e) == (int(e['y'].max())+1, int(e['x'].max())+1)
    check_events(e, sensor_extent(e))                                # just large enough

@pytest.mark.parametrize('axis,value,shown', [('x',240,'0..239'), ('x',-1,'0..239'), ('y',180,'0..179'), ('y',-5,'0..179')])
def test_check_names_the_pixel_outside(axis, value, shown):
    e = random_events(); e[axis][17] = value
    with pytest.raises(ValueError, match=rf'some\.bin: {axis} = {value} at event 17 .*{shown}'): check_events(e, (180,240), 'some.bin')
    if value>=0: check_events(e)                                     # no sensor size, no far edge
    else:
        with pytest.raises(ValueError, match='event 17'): check_events(e)

def test_check_names_the_first_time_that_runs_backwards():
    e = random_events(); e['t'] += 10; e['t'][100] = 3
    with pytest.raises(ValueError, match='times run backwards at event 100, 3 µs after'): check_events(e)

def test_equal_times_are_fine():
    check_events(make_events([0,1],[0,1],[5,5],[0,1]))

def test_no_events_are_refused():
    "Defect 8: an empty slice crashed."
    with pytest.raises(ValueError, match='no events'): check_events(random_events()[:0], name='x')

# ---- rate, slices, windows
@pytest.mark.parametrize('bin_us', [1000, 7777, 10**7])
def test_rate_counts_every_event_once(bin_us):
    e = random_events(); edges,rate = event_rate(e, bin_us)
    assert len(edges)==len(rate)+1 and edges[0]==e['t'][0] and edges[-1]>e['t'][-1]
    assert np.isclose((rate*bin_us/1e6).sum(), len(e))
    assert np.allclose(rate*bin_us/1e6, np.histogram(e['t'], edges)[0])

def test_slices_are_half_open_views():
    e = random_events(); cut = int(e['t'][777])
    parts = [slice_by_time(e, 0, cut), slice_by_time(e, cut, 10**9)]
    assert (np.concatenate(parts)==e).all() and np.shares_memory(parts[0], e)
    assert (parts[0]['t']<cut).all() and (parts[1]['t']>=cut).all()
    assert len(slice_by_time(e, 50, 50))==0 and len(slice_by_count(e, 1990, 100))==10

@pytest.mark.parametrize('n,overlap', [(1,0), (7,0), (7,3), (7,6), (2000,0), (2000,1999), (5000,10)])
@pytest.mark.parametrize('count', [1, 6, 7, 8, 2000])
def test_windows_by_count_cover_everything(n, overlap, count):
    w = windows_by_count(random_events(count), n, overlap)
    assert w[0][0]==0 and w[-1][1]==count
    assert all(b-a==n for a,b in w[:-1]) and 0<w[-1][1]-w[-1][0]<=n
    assert all(b-c==overlap for (_,b),(c,_) in zip(w, w[1:]))
    assert len(w)==1 or w[-1][1]>w[-2][1]                            # the last one holds something new

@pytest.mark.parametrize('window,overlap', [(1000,0), (1000,400), (40_000,0), (40_000,39_000), (10**9,0), (10**9,10**8)])
def test_windows_by_time_cover_everything(window, overlap):
    e = random_events(); w = windows_by_time(e, window, overlap)
    covered = np.zeros(len(e), int)
    for a,b in w: covered[a:b] += 1
    assert covered.min()>=1 and (overlap or covered.max()==1)
    assert all(0 <= e['t'][b-1]-e['t'][a] < window for a,b in w)

def test_silence_makes_no_window():
    e = make_events([0,1],[0,1],[0,10**6],[0,1])
    assert windows_by_time(e, 1000) == [(0,1),(1,2)]

@pytest.mark.parametrize('overlap', [-1, 5, 6])
def test_overlap_must_leave_a_step(overlap):
    for f in (windows_by_count, windows_by_time):
        with pytest.raises(ValueError, match='0..4'): f(random_events(), 5, overlap)

# ---- packing
def test_pack_and_unpack_give_the_same_events():
    "Defect 8: 8 bytes an event, not 32."
    e = random_events(5000, (4096,4096), 2**38)
    e[:2] = make_events([0,4095], [0,4095], [0,0], [0,1]); e[-1] = (4095, 4095, 2**38-1, True)
    packed = pack_events(e)
    assert packed.dtype==np.uint64 and packed.nbytes==8*len(e)
    assert (unpack_events(packed)==e).all() and (unpack_events(packed.view(np.int64))==e).all()
    assert (packed.view(np.int64)>=0).all()                          # torch reads the words as int64

def test_layout_of_the_word():
    word = int(pack_events(make_events([5],[6],[7],[1]))[0])
    assert word == 5 | 6<<12 | 1<<24 | 7<<25

def test_no_events_pack_to_nothing():
    assert len(pack_events(random_events()[:0]))==0 and len(unpack_events(np.empty(0, np.uint64)))==0

@pytest.mark.parametrize('event,word', [((4096,0,0,1),'x = 4096'), ((-1,0,0,1),'x = -1'), ((0,4096,0,1),'y = 4096'), ((0,-1,0,0),'y = -1'),
                                        ((0,0,-1,1),'subtract the first time'), ((0,0,2**38,1),'0..274877906943')])
def test_what_does_not_fit_is_refused(event, word):
    e = random_events(5); e[3] = event
    with pytest.raises(ValueError, match='at event 3') as err: pack_events(e)
    assert word in str(err.value)

def test_callers_events_are_left_alone():
    e = random_events(); before = e.copy()
    check_events(e); pack_events(e); windows_by_time(e, 1000); event_rate(e, 1000)
    assert (e==before).all()
