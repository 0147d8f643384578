"Values of the original, to the last digit, where its ways are asked for. Some lie in tests/data; the rest in the folder of reference values."
import random
from pathlib import Path
import numpy as np, pytest, torch
from mem_nb.augment import draw_ops
from mem_nb.batches import batch_events, unbatch_events
from mem_nb.config import ORIGINAL, DataConfig
from mem_nb.events import make_events
from mem_nb.views import Draws, _original_events, make_views

def seeded(seed=0): return torch.Generator().manual_seed(seed)
def near(a, b, atol=1e-5): return torch.allclose(a, b, rtol=0, atol=atol)

def test_the_originals_ways_are_those_of_histograms():
    batch = batch_events([make_events([1,2], [1,2], [0,1], [0,1])], (8,8))
    with pytest.raises(ValueError, match='original = leak is about histograms'): make_views(batch, DataConfig(original=('leak',), representation='voxel'))

DATA = Path(__file__).parent/'data'/'original_pipeline.npz'
EVERY = tuple(w for w in ORIGINAL if w!='brighter_only')
CASES = {0:{}, 1:{}, 2:{}, 3:dict(rand_aug=False), 4:dict(rand_aug=False), 5:None, 6:dict(rand_aug=False, timesurface=True, gammatrafo=True), 7:None}

def replay(events, seed, original=EVERY):
    "Our frame from the draws that the original makes after `seed`."
    random.seed(seed); rng = np.random.RandomState(seed)
    start = random.randint(0, len(events)-30000)
    extra = dict(logtrafo=True, normalize_events=False, hotpixfilter=False) if seed==7 else {}
    d = DataConfig(input_H=96, input_W=96, original=original, **(CASES[seed] or {}), **extra)
    draws = None
    if CASES[seed] is not None:
        back,mirror,shift = rng.random()<.5, rng.random()<.5, rng.randint(-8, 9, size=2)
        draws = Draws(back=torch.tensor([back]), mirror=torch.tensor([mirror]), shift=torch.tensor(shift)[:,None])
        if d.rand_aug: draws.ops,draws.strength = draw_ops(1, seeded(seed))      # the same numbers as torch.manual_seed
    return make_views(batch_events([events[start:start+30000]], (180,240)), d, draws)[0]

@pytest.mark.parametrize('seed', [0,1,2,5])
def test_frames_are_the_originals(seed):
    golden = np.load(DATA)
    events = make_events(golden['x'], golden['y'], golden['t0']+golden['dt'].cumsum(dtype=np.int64), golden['p'])
    frame,want = replay(events, seed),golden[f'out_seed{seed}']
    if seed==5: assert near(frame[[0,2]], torch.tensor(want), 1e-6) and frame[1].abs().sum()==0
    else: assert torch.equal(frame, torch.tensor(want).float()/255)              # to the last level, RandAugment and all

@pytest.mark.parametrize('seed', CASES)
def test_all_frames_are_the_originals(shared, seed):
    golden = np.load(shared/'golden'/'pipeline.npz')
    frame = replay(make_events(*golden['events'].astype(float).T), seed)
    assert near(frame, torch.tensor(golden[f'out_seed{seed}']), 2e-7)            # 0 for seeds 0 to 5

def test_histograms_are_the_originals(shared):
    golden = np.load(shared/'golden'/'hist.npz')
    image = lambda e, size, **kw: make_views(batch_events([make_events(*golden[e].T)], size), DataConfig(input_H=kw.pop('h', size[0]), input_W=kw.pop('w', size[1]), frame_fit='crop', hotpixfilter=False, normalize_events=False, **kw))[0]*255
    for name,e,size,kw in (('img_auto','events',(180,240),dict(original=('bytes','own_size'))), ('img_fixed_200x260','events',(200,260),dict(original=('bytes',))),
                           ('img_auto_ts','events',(180,240),dict(original=('bytes','own_size'), timesurface=True)),
                           ('img_hot_overflow','events_hot',(180,240),dict(original=('bytes','own_size'))),
                           ('img_p01','events_p01',(100,120),dict(original=('brighter_only','bytes','own_size')))):
        assert near(image(e, size, **kw), torch.tensor(golden[name]).permute(2,0,1).float(), 1e-4), name

@pytest.mark.parametrize('seed', [0,1,2])
def test_single_event_steps_are_the_originals(shared, seed):
    golden = np.load(shared/'golden'/'transforms.npz')
    batch,d = batch_events([make_events(*golden['ev_in'].T)], (480,640)),DataConfig(original=('own_size',))
    columns = lambda draws: (lambda e: np.stack([e['x'], e['y'], e['t'], e['p']*2.-1], 1))(unbatch_events(_original_events(batch, d, draws)[0])[0])
    assert np.array_equal(columns(Draws(shift=torch.tensor(golden[f'shift8_seed{seed}_xy'])[:,None])), golden[f'shift8_seed{seed}'])
    assert np.array_equal(columns(Draws(mirror=torch.tensor([True]))), golden['flipx_p1_auto'])
    assert np.array_equal(columns(Draws(back=torch.tensor([True]))), golden['timeflip_p1'])

def test_rescaled_coordinates_are_the_originals_cut_off(shared):
    golden = np.load(shared/'golden'/'transforms.npz')
    batch,d = batch_events([make_events(*golden['ev_in'].T)], (480,640)),DataConfig(original=('bytes',), frame_fit='scale_crop')
    for name,draws in (('rescale_train', Draws(corner=torch.zeros(2,1, dtype=torch.int64))), ('rescale_eval', None)):
        e,_ = _original_events(batch, d, draws)
        assert np.array_equal(torch.stack([e.x,e.y],1), np.trunc(golden[name][:,:2])), name
