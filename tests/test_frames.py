"Laws of frames; the numbers are the defects of the original that each test guards against."
import numpy as np, pytest, torch
from mem_nb.events import make_events
from mem_nb.batches import batch_events, keep, unbatch_events
from mem_nb.frames import (stacked_counts, event_histogram, gamma_transform, histogram, log_transform, normalize_frames, remove_hot_pixels,
                           resize_frames, time_surface, to_frames, voxel_grid)

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))]
SIZE = (12,20)

def draw(n, seed=0, size=SIZE, t0=0):
    "A recording of noise."
    rng = np.random.default_rng([seed, n])
    t = t0 + np.sort(rng.integers(0, 10**5, n))
    return make_events(rng.integers(0, size[1], n), rng.integers(0, size[0], n), t, rng.integers(0, 2, n))

@pytest.fixture
def recordings(): return [draw(n, t0=10**9) for n in (300, 0, 1, 2000, 0)]

@pytest.fixture
def batch(recordings): return batch_events(recordings, SIZE, labels=[3,1,4,1,5])

WAYS = [dict(), dict(timesurface=True, log=True), dict(size=(8,24), gamma=.5), dict(size=(16,16), fit='crop', gain=2),
        dict(normalize=False), dict(representation='voxel', voxel_bins=3),
        dict(representation='voxel', voxel_bins=5, log=True, size=(9,9), normalize=False), dict(representation='stacked', voxel_bins=3, hot_pixel_stds=None)]

# ---- batches
def test_there_and_back(batch, recordings):
    assert all(np.array_equal(a, b) for a,b in zip(unbatch_events(batch), recordings, strict=True))
    assert batch.labels.tolist()==[3,1,4,1,5] and len(batch)==5
    assert batch.sample.bincount(minlength=5).tolist() == [len(r) for r in recordings]

def test_events_outside_the_sensor_are_refused():
    with pytest.raises(ValueError, match='sample 1.*outside'): batch_events([draw(5), draw(50, size=(30,30))], SIZE)
    with pytest.raises(ValueError, match='backwards'): batch_events([draw(50)[::-1]], SIZE)

def test_keep_drops_what_is_masked_out(batch, recordings):
    kept = unbatch_events(keep(batch, batch.p))
    assert all(np.array_equal(a, b[b['p']]) for a,b in zip(kept, recordings, strict=True))
    assert [len(r) for r in unbatch_events(keep(batch, batch.x<0))] == [0]*5

# ---- counting
def test_counts_are_kept(batch, recordings):
    counts = histogram(batch)
    assert counts.dtype==torch.int64 and counts.shape==(5,2,*SIZE)
    assert counts.sum((1,2,3)).tolist() == [len(r) for r in recordings]
    assert np.array_equal(counts, np.stack([event_histogram(r, SIZE) for r in recordings]))

def test_defect_3_darker_events_count_whether_0_or_minus_1(shared):
    golden = np.load(shared/'golden'/'hist.npz')
    x,y,t,p = golden['events_p01'].T
    h,w,_ = golden['img_p01'].shape
    counts = event_histogram(make_events(x, y, t, p), (h,w))
    assert set(p)=={0,1} and not golden['img_p01'][...,2].any()      # what the original made of it
    assert counts[1].sum() == (p==0).sum() > 0
    assert np.array_equal(counts[0], golden['img_p01'][...,0])
    assert np.array_equal(counts, event_histogram(make_events(x, y, t, 2*p-1), (h,w)))

def test_defect_4_counts_do_not_wrap_at_256(shared):
    golden = np.load(shared/'golden'/'hist.npz')
    img = golden['img_hot_overflow']
    counts = event_histogram(make_events(*golden['events_hot'].T), img.shape[:2])
    assert counts[0,50,100]>=300 and counts[1,51,101]>=256
    assert np.array_equal(counts[[0,1]]%256, img[...,[0,2]].transpose(2,0,1))
    one = make_events([5]*300, [2]*300, range(300), [True]*300)
    assert event_histogram(one, SIZE).max() == histogram(batch_events([one], SIZE)).max() == 300

def test_defect_5_a_frame_has_the_size_of_the_sensor_not_of_its_events():
    corner = make_events([1,2], [1,3], [0,1], [0,1])
    batch = batch_events([corner, draw(500)], SIZE)
    frames = to_frames(batch, hot_pixel_stds=None)
    assert frames.shape[-2:] == SIZE
    assert frames[0,0].nonzero().tolist() == [[3,2]]                  # not stretched

@pytest.mark.parametrize('way', WAYS)
def test_defect_8_a_slice_without_events_is_an_empty_frame(way):
    nothing = batch_events([draw(0), draw(0)], SIZE)
    assert to_frames(nothing, **way).abs().sum()==0
    mixed = to_frames(batch_events([draw(0), draw(9), draw(0)], SIZE), **way)
    assert mixed.isfinite().all() and mixed[0].abs().sum()==mixed[2].abs().sum()==0 < mixed[1].abs().sum()

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('way', WAYS)
def test_a_batch_gives_what_each_sample_gives_alone(way, device, recordings):
    together = to_frames(batch_events(recordings, SIZE).to(device), **way)
    assert together.dtype==torch.float32 and together.device.type==device
    for r,f in zip(recordings, together.cpu(), strict=True):
        alone = to_frames(batch_events([r], SIZE), **way)[0]
        assert torch.allclose(f, alone, rtol=0, atol=1e-6 if device=='cpu' else 1e-5)   # a voxel's sums may come in another order

@pytest.mark.parametrize('name,kw', [('img_auto',{}), ('img_fixed_200x260',{}), ('img_auto_ts',dict(timesurface=True))])
def test_frames_are_the_originals(shared, name, kw):
    golden = np.load(shared/'golden'/'hist.npz')
    img = torch.tensor(golden[name]).permute(2,0,1)
    batch = batch_events([make_events(*golden['events'].T)], img.shape[1:])
    frames = to_frames(batch, hot_pixel_stds=None, normalize=False, **kw)[0]*255
    assert torch.equal(frames[[0,2]].round().to(torch.uint8), img[[0,2]])
    assert (frames[1]-img[1]).abs().max() <= 1.01                     # a time surface in bytes is cut off

# ---- time
def test_time_surface_holds_the_last_event():
    e = make_events([3,3,7], [2,2,4], [1000,1500,2000], [0,1,1])
    s = time_surface(batch_events([e], SIZE))[0,0]
    assert s[2,3]==.5 and s[4,7]==1 and s.count_nonzero()==2

def test_time_does_not_depend_on_clock_or_speed(recordings):
    r = recordings[3]
    slow = r.copy(); slow['t'] = (r['t']-10**9)*7 + 5
    batch = batch_events([r, slow], SIZE)
    for f in (time_surface(batch), voxel_grid(batch)): assert torch.allclose(f[0], f[1], atol=1e-4)

@pytest.mark.parametrize('bins', [1,2,5])
def test_voxel_grid_holds_brighter_minus_darker(batch, bins):
    counts,grid = histogram(batch).float(),voxel_grid(batch, bins)
    assert grid.shape==(5,bins,*SIZE)
    assert torch.allclose(grid.sum(1), counts[:,0]-counts[:,1], atol=1e-4)

def test_voxel_grid_shares_an_event_between_neighbours():
    e = make_events([0,4,9], [0,0,0], [0,375,1000], [1,1,0])
    grid = voxel_grid(batch_events([e], SIZE), 5)[0]
    assert grid[:,0,4].tolist()==[0,.5,.5,0,0] and grid[0,0,0]==1 and grid[4,0,9]==-1

# ---- size and scale
def test_resize_is_the_originals(shared):
    golden = np.load(shared/'golden'/'transforms.npz')
    frames = torch.tensor(golden['totensor'])[None]
    for name,size in [('resize_224',(224,224)), ('resize_96x128_down',(96,128)), ('resize_112x300_mixed',(112,300))]:
        assert torch.allclose(resize_frames(frames, size)[0], torch.tensor(golden[name]), atol=1e-6)

@pytest.mark.parametrize('size', [(6,6), (13,7), (30,31)])
def test_crop_keeps_the_centre_and_pads_with_zeros(size):
    from torchvision.transforms.v2.functional import center_crop
    even = torch.rand(2,3,6+size[0]%2,6+size[1]%2)                    # same parity: only one centre
    assert torch.equal(resize_frames(even, size, 'crop'), center_crop(even, list(size)))

def test_hot_pixels_scale_log_and_gamma_are_the_originals(shared):
    golden = {k:torch.tensor(v) for k,v in np.load(shared/'golden'/'transforms.npz').items() if v.shape==(3,96,128)}
    frames = golden['resize_96x128_down'][None]
    same = lambda a, name: torch.allclose(a[0], golden[name], atol=1e-6)
    assert same(remove_hot_pixels(frames, 10), 'hot10') and same(remove_hot_pixels(frames, 3), 'hot3')
    assert same(normalize_frames(golden['hot10'][None]), 'normalize')
    assert same(log_transform(frames), 'log') and same(gamma_transform(frames, .5), 'gamma05')

def test_one_hot_pixel_does_not_hide_the_rest():
    counts = torch.zeros(2,3,16,16); counts[:,[0,2],4:8,4:8] = 3; counts[0,0,9,9] = 5000
    clean = remove_hot_pixels(counts, 10)
    assert clean[0,:,9,9].abs().sum()==0 and torch.equal(clean[0], counts[1]) and torch.equal(clean[1], counts[1])
    assert counts[0,0,9,9]==5000                                      # the caller's frame is left alone

def test_the_hot_pixel_rule_empties_a_very_sparse_frame():
    "As the original's: where fewer than one pixel in a hundred has an event, each event is ten standard deviations up."
    few = batch_events([draw(1), draw(40)], SIZE)
    assert to_frames(few).count_nonzero((1,2,3)).tolist()==[0, (histogram(few)[1]>0).sum()]
    assert to_frames(few, hot_pixel_stds=None)[0].sum()==1

def test_every_sample_has_its_own_maximum(batch):
    frames = to_frames(batch)
    assert frames[[0,3]].amax((1,2,3)).tolist()==[1,1] and frames.min()==0
    assert to_frames(batch, gain=3).max()==1                          # clipped

def test_defect_9_the_logarithm_is_that_of_counts():
    e = make_events([1]*3+[2]*63, [1]*66, range(66), [1]*66)          # 3 and 63 events: log 4, log 64
    frame = to_frames(batch_events([e], SIZE), hot_pixel_stds=None, log=True)[0,0]
    assert torch.allclose(frame[1,1]/frame[1,2], torch.tensor(1/3), atol=1e-6)   # of counts / 255 it would be 1/19
    raw = to_frames(batch_events([e], SIZE), hot_pixel_stds=None, normalize=False, log=True)[0,0]
    assert torch.allclose(raw[1,2], torch.tensor(.75))                # log 64 / log 256

def test_voxels_keep_their_sign(batch):
    for kw in (dict(), dict(log=True), dict(gamma=.5), dict(normalize=False)):
        frames,grid = to_frames(batch, representation='voxel', hot_pixel_stds=None, **kw),voxel_grid(batch)
        assert torch.equal(frames.sign(), grid.sign()) and frames.abs().max()<=1

def test_unknown_words_name_the_known(batch):
    with pytest.raises(ValueError, match='known: histogram, voxel'): to_frames(batch, representation='voxels')
    with pytest.raises(ValueError, match='known: resize, crop'): to_frames(batch, (8,8), fit='stretch')

def test_evaluation_frames_are_the_originals_end_to_end(shared):
    import random
    golden = np.load(shared/'golden'/'pipeline.npz')
    events = make_events(*golden['events'].astype(float).T)
    def sliced(seed):
        random.seed(seed); start = random.randint(0, len(events)-30000)
        return batch_events([events[start:start+30000]], (180,240))
    assert torch.allclose(to_frames(sliced(5), (96,96))[0], torch.tensor(golden['out_seed5']), atol=1e-5)
    plain = to_frames(sliced(7), (96,96), hot_pixel_stds=None, normalize=False)   # counts / 255, as theirs
    assert torch.allclose(log_transform(plain)[0], torch.tensor(golden['out_seed7']), atol=1e-5)

@pytest.mark.parametrize('bins', [1,3,4])
def test_stacked_counts_keep_every_event_in_its_slice_of_time(batch, recordings, bins):
    stacked = stacked_counts(batch, bins).unflatten(1, (2,bins))           # (B, 2, bins, H, W)
    assert torch.equal(stacked.sum(2), histogram(batch).float())
    for e,got in zip(recordings, stacked):
        if not len(e): assert got.sum()==0; continue
        t = (e['t']-e['t'][0])/max(1, e['t'][-1]-e['t'][0])
        want = np.histogram(t, np.linspace(0, 1, bins+1))[0]
        assert abs(got.sum((0,2,3)).numpy()-want).max()<=1                # float32 on an edge
