"Views: a batch of events to training frames; as it should be, and by a word as the original did."
import random
from dataclasses import replace
import numpy as np, pytest, torch
from mem_nb.augment import OPS, bend_events, draw_bend, drop_events, slice_events
from mem_nb.config import ORIGINAL, DataConfig, parse_config
from mem_nb.data import make_frames
from mem_nb.events import make_events, pack_events
from mem_nb.batches import PackedBatch, batch_events, unbatch_events
from mem_nb.frames import move_events, pixel_map, to_frames
from mem_nb.views import Draws, crop_frames, draw_changes, level_op, make_views, scaled_size

SIZE = (36,48)
ALL = dict(input_H=32, input_W=32, slice_max_evs=4000)

def seeded(seed=0): return torch.Generator().manual_seed(seed)

def events(n=3000, seed=0, size=SIZE):
    rng = np.random.default_rng(seed)
    return make_events(rng.integers(0, size[1], n), rng.integers(0, size[0], n), np.sort(rng.integers(0, 10**5, n)), rng.integers(0, 2, n))

def packed(lengths=(3000,0,1,700), size=SIZE):
    each = [events(n, i, size) for i,n in enumerate(lengths)]
    words = torch.from_numpy(np.concatenate([pack_events(e) for e in each]).view(np.int64))
    return PackedBatch(words, torch.tensor([0,*lengths]).cumsum(0), torch.arange(len(lengths)), size), each

WAYS = [dict(), dict(geometry='frames'), dict(frame_fit='crop'), dict(frame_fit='scale_crop'), dict(frame_fit='scale_crop', geometry='frames'),
        dict(timesurface=True), dict(representation='voxel'), dict(logtrafo=True, gammatrafo=True), dict(rotate=20., scale=.2, translate=.1),
        dict(rotate=20., geometry='frames'), dict(original=ORIGINAL), dict(original=ORIGINAL, frame_fit='scale_crop'), dict(event_drop=.3),
        dict(shear=.3), dict(shear=.3, rotate=20., geometry='frames'), dict(representation='stacked', voxel_bins=3)]

# ---- packed batches
def test_a_packed_batch_holds_the_same_events():
    batch,each = packed()
    for a,b in zip(unbatch_events(batch.unpack()), each): assert np.array_equal(a, b)
    assert len(batch)==4 and batch.to('cpu').labels.tolist()==[0,1,2,3] and batch.num_events==3701

def test_a_slice_is_a_run_of_consecutive_events_begun_anywhere():
    batch,each = packed((3000,50,0))
    starts = set()
    for seed in range(30):
        a,b,c = unbatch_events(slice_events(batch, 100, seeded(seed)).unpack())
        i = np.flatnonzero((each[0]['t']==a['t'][0])&(each[0]['x']==a['x'][0])&(each[0]['y']==a['y'][0]))[0]
        starts.add(i); assert len(a)==100 and np.array_equal(a, each[0][i:i+100]) and np.array_equal(b, each[1]) and not len(c)
    assert len(starts)>20

def test_dropped_events_are_dropped_at_random_and_the_rest_stays():
    batch,each = packed()
    left = unbatch_events(drop_events(batch, .3, seeded()).unpack())
    assert .6*3000<len(left[0])<.8*3000 and set(left[0].tolist())<=set(each[0].tolist())

# ---- laws
@pytest.mark.parametrize('way', WAYS, ids=str)
def test_a_batch_gives_what_its_samples_give_and_chance_is_the_generators(way):
    d,(batch,_) = DataConfig(**ALL, **way),packed()
    if d.event_drop:
        assert not torch.equal(make_frames(batch, d, seeded()), make_frames(batch, replace(d, event_drop=0.), seeded()))
        return
    draws = draw_changes(len(batch), SIZE, d, seeded(3), .2)
    together = make_views(batch, d, draws)
    alone = torch.cat([make_views(batch.part(i, i+1), d, draws.part(i, i+1)) for i in range(len(batch))])
    assert together.shape==(4,d.in_chans,32,32) and torch.isfinite(together).all() and torch.allclose(together, alone, atol=1e-5)
    assert torch.equal(make_frames(batch, d, seeded(5), .2), make_frames(batch, d, seeded(5), .2))
    assert torch.equal(make_frames(batch, d), make_frames(batch, d))         # defect 6: without a generator nothing is drawn
    assert torch.allclose(make_frames(batch, d), make_frames(batch.unpack(), d), atol=1e-6)

@pytest.mark.parametrize('way', WAYS, ids=str)
def test_bending_changes_every_kind_of_frame_and_is_the_generators(way):
    d,(batch,_) = DataConfig(**ALL, **way, bend=.1),packed()
    bent = make_frames(batch, d, seeded(5))
    assert torch.isfinite(bent).all() and torch.equal(bent, make_frames(batch, d, seeded(5)))
    assert not torch.equal(bent, make_frames(batch, replace(d, bend=0.), seeded(5)))

def test_each_sample_of_a_batch_is_bent_alone():
    batch,_ = packed()
    bend = draw_bend(len(batch), SIZE, .2, seeded())
    together = bend_events(batch, bend)
    for i in range(len(batch)):
        alone,part = bend_events(batch.part(i, i+1), bend[i:i+1]),together.part(i, i+1)
        assert torch.equal(alone.words, part.words)
    unbent = bend_events(batch, bend*0)
    assert torch.equal(unbent.words, batch.words) and torch.equal(unbent.offsets, batch.offsets)

def test_nothing_is_lost_where_nothing_moves_out():
    batch,each = packed((3000,500))
    d = DataConfig(input_H=36, input_W=48, max_random_shift_evs=0, rand_aug=False, normalize_events=False, hotpixfilter=False)
    assert [round(v) for v in (make_frames(batch, d, seeded())*255).sum((1,2,3)).tolist()]==[3000,500]

@pytest.mark.parametrize('geometry', ['events','frames'])
def test_events_and_frames_are_moved_alike(geometry):
    "A large block of events, turned by either way, covers the same pixels."
    y,x = (a.ravel() for a in np.mgrid[8:28,12:36])
    e = make_events(np.tile(x, 4), np.tile(y, 4), np.arange(4*len(x)), np.ones(4*len(x)))
    batch = batch_events([e]*8, SIZE)
    d = DataConfig(input_H=36, input_W=48, flip=0, time_flip=0, max_random_shift_evs=0, rand_aug=False, rotate=25., scale=.2, translate=.1)
    one,two = (make_frames(batch, replace(d, geometry=g), seeded()) for g in ('events','frames'))
    assert ((one[:,0]>0)==(two[:,0]>.35)).float().mean()>.96 and not torch.equal(one, make_frames(batch, d))

def test_two_views_are_one_sample_before_and_after_its_jitter():
    batch,_ = packed((3000,700))
    d = DataConfig(**ALL)
    clean,lit = make_frames(batch, d, seeded(), .4, two_views=True)
    assert torch.equal(lit, make_frames(batch, d, seeded(), .4)) and not torch.equal(clean, lit)
    assert ((clean>0)==(lit>0)).all() and torch.equal(*make_frames(batch, d, two_views=True))

def test_nimagenets_crop_is_of_256_pixels_for_224():
    d = DataConfig(frame_fit='scale_crop')
    assert scaled_size(d, (480,640))==(256,341)
    corners = torch.cat([draw_changes(64, (480,640), d, seeded(s)).corner for s in range(4)], 1)
    assert corners[0].min()>=0 and corners[0].max()<=117 and corners[1].max()<=32 and corners[1].max()>25
    frames = torch.arange(2*30*40.).view(1,2,30,40)
    assert torch.equal(crop_frames(frames, torch.tensor([[5],[3]]), (10,12)), frames[:,:,3:13,5:17])

def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match='original has .*known: brighter_only, bytes'): parse_config('original = leek')

# ---- defects of the original: right by default, and theirs by a word
def twenty(p, at=(3,4), n=20): return batch_events([make_events([at[1]]*n, [at[0]]*n, range(n), [p]*n)], (8,8))
RAW = DataConfig(input_H=8, input_W=8, flip=0, time_flip=0, max_random_shift_evs=0, rand_aug=False, hotpixfilter=False, normalize_events=False)

def test_defect_3_darker_events_count():
    assert round(float(make_frames(twenty(0), RAW)[0,2].sum()*255))==20
    assert make_frames(twenty(0), replace(RAW, original=('brighter_only',))).sum()==0

def test_defect_4_counts_do_not_wrap_at_256():
    many = twenty(1, n=300)
    bright = lambda **kw: float(make_frames(many, replace(RAW, **kw))[0,0].max()*255)
    assert round(bright())==255 and round(bright(original=('bytes',)))==44      # clipped at full, theirs begin again
    assert make_frames(many, replace(RAW, normalize_events=True))[0,0,3,4]==1

def test_defect_5_the_frame_is_as_large_as_the_sensor():
    assert make_frames(twenty(1), RAW)[0,0].nonzero().tolist()==[[3,4]]
    assert make_frames(twenty(1), replace(RAW, original=('own_size',)))[0,0].nonzero()[-1].tolist()==[7,7]   # stretched to the last event
    flipped = replace(RAW, flip=1.)
    assert make_frames(twenty(1), flipped, seeded())[0,0].nonzero().tolist()==[[3,3]]                        # about the sensor's middle

def test_defect_9_the_logarithm_is_of_counts():
    e = batch_events([make_events([1]+[5]*15, [1]*16, range(16), [1]*16)], (8,8))
    ratio = lambda **kw: (f := make_frames(e, replace(RAW, logtrafo=True, **kw))[0,0])[1,5]/f[1,1]
    assert ratio()==pytest.approx(4, abs=.01) and ratio(original=('log255',))>14          # log(16)/log(2) = 4; theirs is nearly linear

def test_defect_10_colour_leaves_the_times_alone():
    batch,_ = packed((3000,700))
    d = DataConfig(**ALL)
    assert not make_frames(batch, d, seeded(), .4)[:,1].any()
    leaks = [make_frames(batch, replace(d, original=('leak',)), seeded(s), .4)[:,1].any() for s in range(12)]
    assert any(leaks)

def test_which_events_count_does_not_depend_on_how_they_are_carried():
    "brighter_only and a reversal: what was brighter becomes darker, the rest is lost."
    batch,each = packed((400,))
    d = replace(RAW, original=('brighter_only',), time_flip=1., input_H=36, input_W=48)
    one,two = (make_frames(b, d, seeded())[0] for b in (batch, batch.unpack()))
    bright = each[0][each[0]['p']]
    assert torch.equal(one, two) and not one[0].any() and round(float(one[2].sum()*255))==len(bright)
    assert sorted(zip(*one[2].nonzero().T.tolist()))==sorted({(int(e['y']),int(e['x'])) for e in bright})

# ---- the original's values
def test_rand_augment_on_bytes_is_the_originals_to_the_last_digit(shared):
    golden = np.load(shared/'golden'/'randaug.npz')
    for seed in range(24):
        x = torch.tensor(golden['sparse'])[None]
        for op,index,sign in golden[f'full/seed{seed}_draws'].tolist():
            x = level_op(x, OPS[op], index/30*(1-2*sign if golden[f'signed/{OPS[op]}'] else 1))
        assert np.array_equal(x[0].numpy(), golden[f'full/seed{seed}']), seed

def theirs(seed, events, signed):
    "The original's draws, in its order, from its three generators: the slice's start, and `Draws`."
    random.seed(seed); torch.manual_seed(seed); rng = np.random.RandomState(seed)
    start = random.randint(0, len(events)-30000)
    one = lambda v: torch.tensor([v])
    back,mirror,shift = rng.random()<.5,rng.random()<.5,rng.randint(-8, 9, size=2)
    ops = [(int(torch.randint(14, (1,))), int(torch.randint(21, (1,))), int(torch.randint(2, (1,)))) for _ in range(2)]
    strength = [i/30*(1-2*s if signed(OPS[k]) else 1) for k,i,s in ops]
    return start, Draws(one(bool(back)), one(bool(mirror)), torch.tensor(shift)[:,None], ops=torch.tensor([[k] for k,_,_ in ops]), strength=torch.tensor([[s] for s in strength]))

CASES = {0:{}, 1:{}, 2:{}, 3:dict(rand_aug=False), 4:dict(rand_aug=False), 5:None, 6:dict(rand_aug=False, timesurface=True, gammatrafo=True),
         7:dict(logtrafo=True, normalize_events=False, hotpixfilter=False)}

@pytest.mark.parametrize('seed', CASES)
def test_with_all_words_the_frame_is_the_originals(shared, seed):
    golden,rand = np.load(shared/'golden'/'pipeline.npz'),np.load(shared/'golden'/'randaug.npz')
    recorded = make_events(*golden['events'].astype(float).T)
    start,draws = theirs(seed, recorded, lambda op: bool(rand[f'signed/{op}']))
    d = DataConfig(input_H=96, input_W=96, original=('bytes','own_size','log255','levels','leak'), **(CASES[seed] or {}))
    if seed in (5,7): draws = None
    elif not d.rand_aug: draws.ops = draws.strength = None
    ours = make_views(batch_events([recorded[start:start+30000]], (180,240)), d, draws)[0].numpy()
    assert np.abs(ours-golden[f'out_seed{seed}']).max() < (1e-5 if not d.rand_aug or draws is None else .0040), 'a byte may be cut off one lower'
    if d.rand_aug and draws is not None: assert (np.abs(ours-golden[f'out_seed{seed}'])>1e-5).mean()<.001

def test_how_the_tokenizer_cools_leaves_frames_as_they_are():
    batch,_ = packed()
    d = DataConfig(**ALL, rotate=20.)
    assert torch.equal(make_frames(batch, d, seeded()), make_frames(batch, replace(d, original=('epoch_schedule',)), seeded()))
    assert not torch.equal(make_frames(batch, d, seeded()), make_frames(batch, replace(d, original=('bytes','epoch_schedule')), seeded()))

def test_a_shear_slants_rows_and_keeps_them():
    d = DataConfig(**ALL, shear=.4, rand_aug=False, flip=0., time_flip=0., max_random_shift_evs=0)
    draws = draw_changes(200, SIZE, d, seeded(5))
    (a,b,c),(e,f,g) = draws.tilt.permute(1,2,0)
    assert (a==1).all() and (f==1).all() and not (c.any() or e.any() or g.any()) and .3<b.abs().max()<=.4 and b.min()<0<b.max()
    batch,_ = packed((3000,))
    inner = batch_events([events(3000, 1, (36,48))], (36,148))               # room for the slant on the right …
    inner.x += 50                                                           # … and on the left
    moved = move_events(inner, pixel_map(draws.tilt[:1], inner.size))
    assert moved.num_events==3000 and torch.equal(moved.y, inner.y)
    slope = ((moved.x-inner.x).float()*(inner.y-inner.y.float().mean())).sum()
    assert torch.sign(slope)==-torch.sign(b[0])
