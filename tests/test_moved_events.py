"Laws of moving events, whichever map moves them."
import numpy as np, pytest, torch
from mem_nb.augment import COLOR, GEOMETRIC, OPS, flip_x, ops_map, shift_events, warp_frames
from mem_nb.batches import batch_events
from mem_nb.config import DataConfig
from mem_nb.events import make_events
from mem_nb.frames import count_events, histogram, move_events, pixel_map, stretch_frames
from mem_nb.views import Draws, draw_changes, event_map, make_views, scaled_size

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))]
SIZE = (24,40)

def seeded(seed=0): return torch.Generator().manual_seed(seed)
def near(a, b, atol=1e-5): return torch.allclose(a, b, rtol=0, atol=atol)
def config(**kw): return DataConfig(**dict(input_H=16, input_W=16, max_random_shift_evs=3) | kw)

def draw(n, size=SIZE, seed=0):
    "A recording of noise."
    rng = np.random.default_rng([seed, n])
    return make_events(rng.integers(0, size[1], n), rng.integers(0, size[0], n), np.sort(rng.integers(0, 10**5, n)), rng.integers(0, 2, n))

def batch_of(*lengths, size=SIZE): return batch_events([draw(n, size) for n in lengths], size, range(len(lengths)))

@pytest.fixture
def batch(): return batch_of(3000, 0, 1, 2000, 50)

def random_map(b, seed=0):
    g = seeded(seed)
    eye = torch.tensor([[1.,0,0],[0,1,0]]).expand(b,2,3)
    return eye + torch.rand(b, 2, 3, generator=g).sub(.5)*torch.tensor([.6,.6,9.])

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('size', [SIZE, (10,61)])
def test_counting_moved_events_is_moving_then_counting(batch, device, size):
    go = pixel_map(random_map(5), SIZE, size).to(device)
    b = batch.to(device)
    assert torch.equal(count_events(b, go, size), histogram(move_events(b, go, size)).float())
    assert torch.equal(count_events(b), histogram(b).float())

def test_many_frames_are_counted_exactly_too():
    many = batch_of(*[30]*9, size=(900,1200))     # more places than float32 has whole numbers
    assert torch.equal(count_events(many), histogram(many).float())

def test_whole_moves_lose_nothing_and_agree_with_frames(batch):
    turn = torch.tensor([[[-1.,0,0],[0,-1,0]]]).expand(5,2,3)
    right = torch.tensor([[[1.,0,-3],[0,1,2]]]).expand(5,2,3)
    for m in (turn, right):
        assert near(count_events(batch, pixel_map(m, SIZE)), warp_frames(histogram(batch).float(), m), 1e-3)
    assert torch.equal(count_events(batch, pixel_map(turn, SIZE)), histogram(batch).flip(2,3).float())

def test_flip_and_shift_are_one_map(batch):
    "The joined map does what the two steps do one after the other, draw by draw."
    d = config(time_flip=0., rand_aug=False)
    draws = draw_changes(5, SIZE, d, seeded(3))
    g = seeded(3)
    steps = shift_events(flip_x(batch, d.flip, g), d.max_random_shift_evs, g)
    assert torch.equal(count_events(batch, event_map(draws, d, SIZE, 5, 'cpu')), histogram(steps).float())

def test_geometric_operations_move_events_as_they_move_frames(batch):
    "Mass and centre agree; the frame is blurred, the events are not."
    blob = batch_events([make_events(*(np.repeat(v, 20) for v in np.mgrid[17:24,9:15].reshape(2,-1)), np.arange(42*20), np.ones(42*20))], SIZE)
    def centre(f):
        y,x = torch.meshgrid(torch.arange(SIZE[0])*1., torch.arange(SIZE[1])*1., indexing='ij')
        return torch.stack([(f*v).sum() for v in (x,y)])/f.sum()
    for name in GEOMETRIC:
        for m in (-.6,.6):
            ops,strength = torch.tensor([[OPS.index(name)]]),torch.tensor([[m]])
            matrix = ops_map(ops, strength, SIZE)
            a,b = count_events(blob, pixel_map(matrix, SIZE))[0,0],warp_frames(histogram(blob).float(), matrix)[0,0]
            assert a.sum()>0 and abs(a.sum()/b.sum()-1)<.1 and (centre(a)-centre(b)).abs().max()<.5, (name, m)
            assert torch.equal(a, a.round())                                  # whole events, none shared out

def test_colour_operations_and_identity_move_nothing():
    still = torch.tensor([[1.,0,0],[0,1,0]])
    for name in ('Identity', *COLOR): assert torch.equal(ops_map(torch.tensor([[OPS.index(name)]]), torch.ones(1,1), SIZE)[0], still)

@pytest.mark.parametrize('geometry', ['events','frames'])
def test_scale_crop_crops_in_training_and_stretches_in_evaluation(geometry):
    d = config(input_H=224, input_W=224, frame_fit='scale_crop', geometry=geometry, hotpixfilter=False, normalize_events=False, flip=0., time_flip=0., max_random_shift_evs=0, rand_aug=False)
    size = (480,640)
    rng = np.random.default_rng(0)
    spread = batch_events([make_events(rng.integers(0,640,20000), rng.integers(0,480,20000), np.arange(20000), np.ones(20000))], size)
    assert scaled_size(d, size)==(256,341)
    if geometry=='events': assert make_views(spread, d).sum().mul(255).round()==20000          # stretched: every event is there
    draws = Draws(corner=torch.tensor([[10],[30]]))
    one = batch_events([make_events([320]*9, [240]*9, range(9), [1]*9)], size)                  # scaled to (170.6, 128), cropped at (10, 30)
    frame = make_views(one, d, draws)[0,0]
    assert frame.argmax() // 224 == 98 and abs(int(frame.argmax() % 224)-160) <= 1
    if geometry=='events': assert frame.sum().mul(255).round()==9                                # the events are in one pixel
    corners = draw_changes(2000, size, d, seeded()).corner
    assert corners.amin(1).tolist()==[0,0] and corners.amax(1).tolist()==[341-224,256-224]

@pytest.mark.parametrize('old,new', [((24,40),(16,16)), ((180,240),(224,224)), ((7,9),(1,30)), ((34,34),(68,17))])
def test_stretching_is_interpolation_with_antialias(old, new):
    x = torch.rand(3,2,*old)
    want = torch.nn.functional.interpolate(x, new, mode='bilinear', antialias=True)
    assert near(stretch_frames(x, new), want, 1e-6) and near(stretch_frames(x.permute(3,0,1,2).contiguous().permute(1,2,3,0), new), want, 1e-6)
