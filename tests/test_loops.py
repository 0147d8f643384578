"The compiled way to frames gives what the operations on batches give."
from dataclasses import replace
import numpy as np, pytest, torch
from mem_nb.augment import COLOR, OPS, apply_ops, bend_events, draw_bend, draw_ops, drop_events
from mem_nb.batches import PackedBatch
from mem_nb.config import DataConfig
from mem_nb.data import make_frames
from mem_nb.events import make_events, pack_events
from mem_nb.frames import pixel_map, to_frames
from mem_nb.loops import loop_frames, pixel_sums
from mem_nb.recolour import loop_ops, recolour, room_for
from mem_nb.views import by_loop

seeded = lambda: torch.Generator().manual_seed(3)
def same(packed, batch): return torch.equal(packed.offsets, batch.offsets) and all(torch.equal(getattr(packed.unpack(), k), getattr(batch, k)) for k in 'xytp')

SIZE = (40,60)

def packed(lengths=(900,0,1,3000,50), seed=0, size=SIZE):
    rng,rows = np.random.default_rng(seed),[]
    for n in lengths: rows.append(pack_events(make_events(rng.integers(0, size[1], n), rng.integers(0, size[0], n), np.sort(rng.integers(0, 10**5, n)), rng.integers(0, 2, n))))
    words = torch.from_numpy(np.concatenate(rows).view(np.int64))
    return PackedBatch(words, torch.tensor([0,*lengths]).cumsum(0), torch.zeros(len(lengths), dtype=torch.int64), size)

def close(a, b): return (a-b).abs().max()<1e-6

@pytest.mark.parametrize('how', [{}, dict(fit='crop'), dict(normalize=False), dict(hot_pixel_stds=None), dict(hot_pixel_stds=2.), dict(gain=3.), dict(gain=.5), dict(timesurface=True), dict(timesurface=True, fit='crop')])
@pytest.mark.parametrize('size', [SIZE, (32,32), (64,48), (17,90)])
def test_frames_as_by_operations(how, size):
    batch = packed()
    assert close(loop_frames(batch, size, **how), to_frames(batch.unpack(), size, **how))

@pytest.mark.parametrize('how', [{}, dict(fit='crop'), dict(normalize=False), dict(hot_pixel_stds=2.), dict(gain=3.)])
@pytest.mark.parametrize('bins', [1,3,10])
def test_stacked_counts_as_by_operations(how, bins):
    batch = packed()
    for size in (SIZE, (32,32), (17,90)): assert close(loop_frames(batch, size, bins=bins, **how), to_frames(batch.unpack(), size, 'stacked', voxel_bins=bins, **how))

@pytest.mark.parametrize('fraction', [0., .15, .9, 1.])
def test_events_are_lost_as_by_operations(fraction):
    batch = packed()
    lost = drop_events(batch, fraction, seeded())
    assert same(lost, drop_events(batch.unpack(), fraction, seeded())) and len(lost.words)<=len(batch.words)
    assert same(batch, packed().unpack())                      # the batch itself is as it was

@pytest.mark.parametrize('bend', [0., .05, .5])
def test_events_are_bent_as_by_operations(bend):
    batch = packed((900,0,1,3000,50))
    arrows = draw_bend(5, SIZE, bend, seeded())
    assert same(bend_events(batch, arrows), bend_events(batch.unpack(), arrows))

def test_the_worst_of_hot_pixels():
    e = make_events([5]*500+[1,2,3], [5]*500+[1,2,3], range(503), [1]*503)
    batch = PackedBatch(torch.from_numpy(pack_events(e).view(np.int64)), torch.tensor([0,503]), torch.zeros(1, dtype=torch.int64), SIZE)
    frames = loop_frames(batch, SIZE)
    assert frames[0,0,5,5]==0 and frames[0,0,1,1]==1 and close(frames, to_frames(batch.unpack(), SIZE))

@pytest.mark.parametrize('d', [DataConfig(), DataConfig(rotate=20, scale=.2, translate=.1), DataConfig(geometry='frames', rotate=20), DataConfig(frame_fit='scale_crop'),
                               DataConfig(frame_fit='crop', flip=1., time_flip=1.), DataConfig(rand_aug=False, max_random_shift_evs=30),
                               *(DataConfig(timesurface=True, time_flip=p, geometry=g, rotate=20, max_random_shift_evs=9) for p in (0.,1.) for g in ('events','frames')),
                               *(DataConfig(representation='stacked', voxel_bins=3, rand_aug=False, time_flip=p, geometry=g, rotate=20, event_drop=.2, bend=.1) for p in (0.,1.) for g in ('events','frames')),
                               DataConfig(representation='stacked', frame_fit='scale_crop', event_drop=.2), DataConfig(bend=.1, event_drop=.5)])
def test_augmented_frames_as_by_operations(d):
    d = replace(d, input_H=48, input_W=56)
    batch = packed()
    assert by_loop(batch, d, None)
    loop,ops = (make_frames(b, d, seeded(), .2, .2) for b in (batch, batch.unpack()))
    assert ((loop-ops).abs()>1e-5).float().mean()<1e-4

@pytest.mark.parametrize('d', [DataConfig(representation='voxel', rand_aug=False), DataConfig(logtrafo=True), DataConfig(gammatrafo=True), DataConfig(original=('bytes',))])
def test_what_the_loop_cannot_takes_the_other_way(d): assert not by_loop(packed(), d, None) and len(make_frames(packed(), d))==5

def test_time_counts_from_the_first_event_that_stays():
    "Events moved off the sensor take their times with them; the last event at a pixel wins, and backwards the first."
    e = make_events([0,10,10,10,39,10], [5]*6, [0,100,200,400,900,500], [1]*6)[[0,1,2,3,5,4]]
    batch = PackedBatch(torch.from_numpy(pack_events(e).view(np.int64)), torch.tensor([0,6]), torch.zeros(1, dtype=torch.int64), (20,40))
    go = pixel_map(torch.tensor([[[1.,0,-5],[0,1.,0]]]), (20,40))                     # the event at x = 39 leaves
    on = lambda **how: loop_frames(batch, (20,40), hot_pixel_stds=None, timesurface=True, go=go, **how)[0,1]
    assert on()[5,15]==1 and on()[5,5]==0 and (on()>0).sum()==1
    back = on(back=torch.tensor([True]))
    assert back[5,5]==1 and close(back[5,15], torch.tensor(.8)) and (back>0).sum()==2

@pytest.mark.parametrize('name', COLOR)
@pytest.mark.parametrize('m', [-1., -.3, 0., .5, 1.])
def test_colours_as_by_operations(name, m):
    frames = torch.rand(3, 3, 24, 33, generator=torch.Generator().manual_seed(1))
    frames[1] = .5                                             # flat
    frames[2] = (frames[2]*3).floor()/2                        # of few levels
    by_ops = apply_ops(frames.clone(), torch.full((1,3), OPS.index(name)), torch.full((1,3), m))
    for f in (loop := frames.clone()): recolour(f.numpy(), name, m, room_for(33))
    assert close(loop, by_ops) and torch.equal(loop[:,1], frames[:,1])

def test_two_operations_a_frame_in_their_order():
    frames,(ops,m) = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)),draw_ops(40, torch.Generator().manual_seed(1))
    loop,by_ops = loop_ops(frames.clone(), ops, m),apply_ops(frames.clone(), ops, m)
    assert ((loop-by_ops).abs()>1e-5).float().mean()<1e-3      # a value on the edge of a level may round either way

def test_an_unknown_colour_is_named():
    with pytest.raises(KeyError, match='known: Brightness'): recolour(np.zeros((3,4,4), np.float32), 'Hue', .1, room_for(4))

@pytest.mark.parametrize('old,new', [(40,40), (40,64), (40,17)])
@pytest.mark.parametrize('fit', ['resize','crop'])
def test_sums_keep_a_flat_picture_flat(old, new, fit):
    index,starts,weights = pixel_sums(old, new, fit)
    sums = [weights[a:b].sum() for a,b in zip(starts, starts[1:])]
    inside = [s for s in sums if s>0]
    assert np.allclose(inside, 1) and len(inside)==(min(old, new) if fit=='crop' else new) and index.max()<old
