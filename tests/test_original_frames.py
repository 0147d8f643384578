"Draws, views and the original's ways; the numbers are the defects of the original that each test guards against."
import os, random, subprocess, sys
from dataclasses import replace
import numpy as np, pytest, torch
from conftest import ROOT
from mem_nb.augment import OPS, draw_ops, drop_events, slice_events
from mem_nb.config import ORIGINAL, DataConfig
from mem_nb.data import make_frames
from mem_nb.events import make_events, pack_events
from mem_nb.batches import PackedBatch, batch_events, unbatch_events
from mem_nb.frames import histogram
from mem_nb.views import Draws, _original_events, draw_changes, level_op, make_views, scaled_size

SIZE = (36,48)
ALL = tuple(w for w in ORIGINAL if w!='brighter_only')   # that one was N-Cars' own
PLAIN = dict(flip=0, time_flip=0, max_random_shift_evs=0, rand_aug=False, hotpixfilter=False, normalize_events=False)

def draw(n, seed=0, size=SIZE):
    "A recording of noise."
    rng = np.random.default_rng([seed, n])
    t = np.sort(rng.integers(0, 10**5, n))
    return make_events(rng.integers(0, size[1], n), rng.integers(0, size[0], n), t, rng.integers(0, 2, n))

def seeded(seed=0): return torch.Generator().manual_seed(seed)

def pack(recordings, size=SIZE):
    "A PackedBatch of event arrays."
    words = np.concatenate([pack_events(e) for e in recordings]).view(np.int64)
    offsets = torch.tensor([0, *map(len, recordings)]).cumsum(0)
    return PackedBatch(torch.from_numpy(words), offsets, torch.full((len(recordings),), -1), size)

RECORDINGS = [draw(n) for n in (900, 0, 1, 3000, 400, 2000)]
WAYS = {name: dict(input_H=32, input_W=40, max_random_shift_evs=3) | kw for name,kw in dict(
    events=dict(), frames=dict(geometry='frames'), tilt=dict(rotate=20, scale=.1, translate=.1),
    surface=dict(timesurface=True), voxel=dict(representation='voxel', voxel_bins=3), crop=dict(frame_fit='crop'),
    scale_crop=dict(frame_fit='scale_crop'), scale_crop_frames=dict(frame_fit='scale_crop', geometry='frames'),
    original=dict(original=ALL), original_crop=dict(original=ALL, frame_fit='scale_crop')).items()}
ways = pytest.mark.parametrize('d', [DataConfig(**kw) for kw in WAYS.values()], ids=WAYS)

# ---- packed batches
def test_unpacking_gives_the_events():
    packed = pack(RECORDINGS)
    assert all(np.array_equal(a, b) for a,b in zip(unbatch_events(packed.unpack()), RECORDINGS, strict=True))
    assert packed.unpack(times=False).t is None
    assert all(np.array_equal(a, b) for a,b in zip(unbatch_events(packed.part(2, 5).unpack()), RECORDINGS[2:5], strict=True))

@pytest.mark.parametrize('most', [1, 100, 2000, 10**6])
def test_slices_are_runs_of_consecutive_events(most):
    cut = slice_events(pack(RECORDINGS), most, seeded())
    assert cut.offsets.diff().tolist() == [min(most, len(r)) for r in RECORDINGS]
    for part,whole in zip(unbatch_events(cut.unpack()), RECORDINGS, strict=True):
        starts = range(len(whole)-len(part)+1)
        assert any(np.array_equal(part, whole[i:i+len(part)]) for i in starts)

def test_slices_reach_both_ends():
    batch = pack([draw(5)]*200)
    first = slice_events(batch, 3, seeded()).words[::3]
    assert set(first.tolist()) == set(batch.words[:3].tolist())

def test_dropping_from_a_packed_batch_is_dropping_from_its_events():
    packed = pack(RECORDINGS)
    a,b = drop_events(packed, .3, seeded()).unpack(),drop_events(packed.unpack(), .3, seeded())
    assert all(np.array_equal(x, y) for x,y in zip(unbatch_events(a), unbatch_events(b), strict=True))
    assert abs(len(a.x)/packed.num_events-.7) < .03

# ---- laws of views
@ways
def test_a_batch_gives_what_each_sample_gives_alone(d):
    batch,draws = pack(RECORDINGS),draw_changes(6, SIZE, d, seeded(1), .2, 0 if d.representation=='voxel' else .2)
    for drawn in (draws, None):
        together = make_views(batch, d, drawn)
        alone = torch.cat([make_views(batch.part(i, i+1), d, drawn and drawn.part(i, i+1)) for i in range(6)])
        assert together.isfinite().all() and together.shape==(6, d.in_chans, *d.input_size)
        assert torch.allclose(together, alone, atol=1e-5)

@ways
def test_the_generator_decides(d):
    batch = pack(RECORDINGS)
    make = lambda seed: make_frames(batch, d, seeded(seed), .2)
    assert torch.equal(make(1), make(1)) and not torch.equal(make(1), make(2))
    state = torch.random.get_rng_state()
    make(1)
    assert torch.equal(state, torch.random.get_rng_state())     # nobody else's chance is used

@ways
def test_defect_6_validation_is_the_same_every_time(d):
    batch = pack(RECORDINGS)
    first = make_frames(batch, d); torch.rand(3); np.random.random(); random.random()
    assert torch.equal(first, make_frames(batch, d))

@ways
def test_packed_or_not_is_the_same(d):
    packed = pack(RECORDINGS); before = packed.words.clone()
    by_loop,by_ops = make_frames(packed, d, seeded()),make_frames(packed.unpack(), d, seeded())     # on a CPU packed events may take loops
    assert ((by_loop-by_ops).abs()>1e-5).float().mean()<1e-4                                        # an event on the edge of a pixel may go either way
    assert torch.equal(packed.words, before)                    # the caller's batch is left alone

@ways
def test_two_views_differ_in_light_alone(d):
    batch,strong = pack(RECORDINGS),.0 if d.representation=='voxel' else .5
    before,after = make_frames(batch, d, seeded(), .5, strong, two_views=True)
    draws = draw_changes(6, SIZE, d, seeded(), .5, strong)
    assert torch.equal(before, make_views(batch, d, replace(draws, light=None)))
    assert torch.equal(after, make_views(batch, d, draws)) and not torch.equal(before, after)
    if 'leak' not in d.original: assert torch.equal((before!=0).any(1), (after!=0).any(1))

def test_counts_are_kept_where_nothing_leaves():
    d = DataConfig(input_H=36, input_W=48, **PLAIN)
    inside = pack([e[(e['x']>10)&(e['x']<37)&(e['y']>10)&(e['y']<25)] for e in RECORDINGS])
    total = make_views(inside, d).sum((2,3))
    b = torch.arange(6)
    draws = Draws(mirror=b%2==0, shift=torch.stack([b-3, 3-b]), tilt=draw_changes(6, SIZE, replace(d, rotate=8), seeded()).tilt)
    assert torch.allclose(make_views(inside, d, draws).sum((2,3)), total, atol=1e-5)
    back = make_views(inside, d, Draws(back=b>=0))
    assert torch.allclose(back.sum((2,3)), total.flip(1), atol=1e-5)

@pytest.mark.parametrize('geometry', ['events','frames'])
def test_a_flip_and_a_shift_are_exact(geometry):
    d,b = DataConfig(input_H=36, input_W=48, geometry=geometry, **PLAIN),torch.ones(6, dtype=torch.bool)
    plain = make_views(pack(RECORDINGS), d)
    assert torch.equal(make_views(pack(RECORDINGS), d, Draws(mirror=b)), plain.flip(-1))
    right = make_views(pack(RECORDINGS), d, Draws(shift=torch.tensor([[5],[-2]]).expand(2,6)))
    assert torch.equal(right[...,:-2,5:], plain[...,2:,:-5]) and right[...,-2:,:].abs().sum()==right[...,:5].abs().sum()==0

@pytest.mark.parametrize('representation', ['histogram','voxel'])
def test_event_drop_is_honoured_in_training_only(representation):
    d = DataConfig(input_H=36, input_W=48, representation=representation, **PLAIN)
    some = replace(d, event_drop=.4)
    assert torch.equal(make_frames(pack(RECORDINGS), d), make_frames(pack(RECORDINGS), some))
    lost = make_frames(drop_events(pack(RECORDINGS), .4, seeded()), d)
    assert torch.equal(make_frames(pack(RECORDINGS), some, seeded()), lost) and not torch.equal(lost, make_frames(pack(RECORDINGS), d))

def test_moved_events_and_moved_frames_agree_but_for_the_blur():
    "Smoothed a little, both show the same picture."
    smooth = lambda f: torch.nn.functional.avg_pool2d(f, 9, 1)
    cloud = draw(20000); cloud = cloud[((cloud['x']-20)**2+(cloud['y']-15)**2 < 80)]
    d = DataConfig(input_H=36, input_W=48, **PLAIN | dict(rotate=30, scale=.1, translate=.1))
    draws = draw_changes(6, SIZE, d, seeded())
    a,b = (smooth(make_views(pack([cloud]*6), replace(d, geometry=g), draws)) for g in ('events','frames'))
    assert (a-b).abs().mean() < .1*b.mean()

@pytest.mark.parametrize('sensor,size,wanted', [((480,640),(224,224),(256,341)), ((180,240),(224,224),(256,341)), ((34,34),(28,28),(32,32))])
def test_scale_crop_scales_to_8_7_of_the_input(sensor, size, wanted):
    d = DataConfig(input_H=size[0], input_W=size[1], frame_fit='scale_crop')
    assert scaled_size(d, sensor)==wanted
    corner = draw_changes(2000, sensor, d, seeded()).corner
    assert corner.amin(1).tolist()==[0,0] and corner.amax(1).tolist()==[wanted[1]-size[1], wanted[0]-size[0]]

# ---- defects, with the switches off
def test_defect_3_darker_events_are_seen():
    d = DataConfig(input_H=36, input_W=48, **PLAIN)
    frames = make_views(pack(RECORDINGS), d)*255
    assert torch.allclose(frames[:,[0,2]], histogram(pack(RECORDINGS).unpack()).float(), atol=1e-4)
    assert make_views(pack(RECORDINGS), replace(d, original=('brighter_only',)))[:,2].abs().sum()==0

def test_defect_4_300_events_are_300():
    busy,d = pack([make_events([5]*300, [2]*300, range(300), [1]*300)]),DataConfig(input_H=36, input_W=48, logtrafo=True, **PLAIN)
    value = lambda n: np.log1p(n)/np.log(256)
    assert abs(make_views(busy, d).max()-min(value(300), 1))<1e-5
    assert abs(make_views(busy, replace(d, original=('bytes',))).max()-value(44))<1e-5

def test_defect_5_the_frame_is_the_sensors():
    corner,d = pack([make_events([1,2], [1,3], [0,1], [0,1])]),DataConfig(input_H=36, input_W=48, **PLAIN)
    assert make_views(corner, d)[0,0].nonzero().tolist()==[[3,2]]
    assert make_views(corner, d, Draws(mirror=torch.ones(1, dtype=torch.bool)))[0,0].nonzero().tolist()==[[3,45]]
    assert len(make_views(corner, replace(d, original=('own_size',)))[0,0].nonzero()) > 100      # theirs is stretched

def test_defect_9_the_logarithm_is_that_of_counts():
    e = make_events([1]*3+[2]*63, [1]*66, range(66), [1]*66)
    d = DataConfig(input_H=36, input_W=48, logtrafo=True, **PLAIN | dict(normalize_events=True))
    ratio = lambda d: (lambda f: (f[1,1]/f[1,2]).item())(make_views(pack([e]), d)[0,0])
    assert abs(ratio(d)-1/3)<1e-5
    assert abs(ratio(replace(d, original=('log255',)))-np.log1p(3/255)/np.log1p(63/255))<1e-5

@pytest.mark.parametrize('geometry', ['events','frames'])
def test_defect_10_nothing_leaks_into_the_middle_channel(geometry):
    d = DataConfig(input_H=32, input_W=40, geometry=geometry)
    for seed in range(12): assert make_frames(pack(RECORDINGS), d, seeded(seed), .2, .2)[:,1].abs().sum()==0
    leaky = [make_frames(pack(RECORDINGS), replace(d, original=('leak',)), seeded(s), .2, .2)[:,1].abs().sum() for s in range(12)]
    assert max(leaky) > 0

# ---- the original's results, with the switches on
def exact(golden, events, image, d, size):
    img = torch.tensor(golden[image]).permute(2,0,1)
    d = replace(d, input_H=img.shape[1], input_W=img.shape[2])
    frame = make_views(batch_events([make_events(*golden[events].T)], size), d)[0]*255
    return torch.equal(frame.round().to(torch.uint8), img)

@pytest.mark.parametrize('events,image,kw', [
    ('events','img_auto',{}), ('events','img_auto_ts',dict(timesurface=True)), ('events_hot','img_hot_overflow',{}),
    ('events_p01','img_p01',dict(original=('bytes','own_size','brighter_only')))])
def test_pictures_are_the_originals_byte_for_byte(shared, events, image, kw):
    golden = np.load(shared/'golden'/'hist.npz')
    assert exact(golden, events, image, DataConfig(**PLAIN | dict(original=('bytes','own_size')) | kw), (200,260))

def test_flips_and_shifts_are_the_originals(shared):
    golden = np.load(shared/'golden'/'transforms.npz')
    batch,d = batch_events([make_events(*golden['ev_in'].T)], (480,640)),DataConfig(original=ALL)
    places = lambda b: np.stack([b.x, b.y, b.t, b.p*2-1], 1)
    yes = torch.ones(1, dtype=torch.bool)
    assert np.array_equal(places(_original_events(batch, d, Draws(mirror=yes))[0]), golden['flipx_p1_auto'])
    assert np.array_equal(places(_original_events(batch, d, Draws(back=yes))[0]), golden['timeflip_p1'])
    for s in range(3):
        shift = torch.tensor(golden[f'shift8_seed{s}_xy'])[:,None]
        assert np.array_equal(places(_original_events(batch, d, Draws(shift=shift))[0]), golden[f'shift8_seed{s}'])

def test_nimagenets_scales_are_the_originals(shared):
    golden = np.load(shared/'golden'/'transforms.npz')
    batch,d = batch_events([make_events(*golden['ev_in'].T)], (480,640)),DataConfig(original=ALL, frame_fit='scale_crop')
    train,val = (_original_events(batch, d, draws)[0] for draws in (Draws(), None))
    for b,name in ((train,'rescale_train'), (val,'rescale_eval')):
        assert np.array_equal(torch.stack([b.x, b.y], 1), np.floor(golden[name][:,:2])), name

@pytest.mark.parametrize('seed,kw', enumerate([{}, {}, {}, dict(rand_aug=False), dict(rand_aug=False), None,
    dict(rand_aug=False, timesurface=True, gammatrafo=True), None]))
def test_the_pipeline_is_the_originals_end_to_end(shared, seed, kw):
    golden = np.load(shared/'golden'/'pipeline.npz')
    events,train = make_events(*golden['events'].astype(float).T),kw is not None
    if seed==7: kw = dict(logtrafo=True, normalize_events=False, hotpixfilter=False)
    d = DataConfig(input_H=96, input_W=96, max_random_shift_evs=8, hotpix_num_stds=10, original=ALL, **kw or {})
    random.seed(seed); rng = np.random.RandomState(seed)
    start = random.randint(0, len(events)-30000)
    draws = None
    if train:
        back,mirror = (torch.tensor([rng.random()<.5]) for _ in range(2))
        draws = Draws(back=back, mirror=mirror, shift=torch.tensor(rng.randint(-8, 9, size=2))[:,None])
        if d.rand_aug: draws.ops,draws.strength = draw_ops(1, seeded(seed))
    frame = make_views(batch_events([events[start:start+30000]], (180,240)), d, draws)[0]
    assert (frame-torch.tensor(golden[f'out_seed{seed}'])).abs().max() < 1e-6

BYTES = """
import sys, numpy as np, torch
from mem_nb.views import level_op
golden,out = np.load(sys.argv[1]),{}
for key in (k for k in golden if k.startswith('out/')):
    _,name,index,sign,image = key.split('/')
    out[key] = level_op(torch.tensor(golden[image]), name, int(index[1:])/30*(-1 if sign=='-' else 1)).numpy()
np.savez(sys.argv[2], **out)
"""

@pytest.fixture(scope='module')
def on_bytes(shared, tmp_path_factory):
    "Every recorded operation, in a process whose MKL rounds alike on all processors: with its own AMX or AVX-512 a shear or rotation may move a byte by one."
    file = tmp_path_factory.mktemp('bytes')/'out.npz'
    subprocess.run([sys.executable, '-c', BYTES, shared/'golden'/'randaug.npz', file], check=True, env=dict(os.environ, PYTHONPATH=str(ROOT), MKL_CBWR='COMPATIBLE'))
    return np.load(file)

@pytest.mark.parametrize('name', OPS)
def test_operations_on_bytes_are_the_originals(shared, on_bytes, name):
    golden = np.load(shared/'golden'/'randaug.npz')
    keys = [k for k in golden if k.startswith(f'out/{name}/')]
    for key in keys: assert np.array_equal(on_bytes[key], golden[key]), key
    assert keys and {k.split('/')[1] for k in on_bytes}<=set(OPS)

def test_randaugment_is_the_originals(shared):
    golden = np.load(shared/'golden'/'randaug.npz')
    for seed in range(24):
        ops,strength = draw_ops(1, seeded(seed))
        want = golden[f'full/seed{seed}_draws']
        assert ops[:,0].tolist()==want[:,0].tolist()
        assert torch.allclose(strength[:,0], torch.tensor(want[:,1]/30*(1-2*want[:,2]), dtype=torch.float32))
        out = torch.tensor(golden['sparse'])
        for k,m in zip(ops[:,0].tolist(), strength[:,0].tolist()): out = level_op(out, OPS[k], m)
        assert torch.equal(out, torch.tensor(golden[f'full/seed{seed}'])), seed
