"Segmentation: what lies where in the files, what the model is, what training keeps, and what is refused."
import json, os, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from conftest import ROOT, SHARED
from mem_nb.augment import flip_x
from mem_nb.config import load_config, parse_config, save_config
from mem_nb.datasets import prepared
from mem_nb.decoder import MaskedSegmenter, decoder_path, load_decoder, pretrain_decoder
from mem_nb.encoder import build_encoder, from_patches
from mem_nb.formats import read_events, recording_size, write_events
from mem_nb.labelled import LabelBatch, LabelledSet, given_sensor, known_sensor, label_path, labelled, list_labelled, pack_labelled, read_image
from mem_nb.overlap import SegmentationScore, boundary_f, boundary_counts, confusion_matrix, overlap_scores
from mem_nb.pipeline import command, steps_of
from mem_nb.pretrain import HiddenTask
from mem_nb.pyramid import build_segmenter, load_backbone, original_backbone, original_input, segmenter_optimizer
from mem_nb.scenes import CLASSES, PATTERNS, Thing, World, film, paint, simulate_scenes
from mem_nb.pairs import paste_things, same_place
from mem_nb.segment import check_segment, frames_a_pass, load_segmenter, pixel_loss, poly_schedule, predict_frames, segment, window_places
from mem_nb.segmented import Film, class_colors, predict_recording, recording_windows
from mem_nb.state import TrainingState, read_log, read_state, read_weights
from mem_nb.status import finished, run_status
from mem_nb.store import EventStore

CONF = """
expweek =
data_set = scenes
data_path = scenes
num_scenes = 4
window_us = 50000
input_H = 64
input_W = 96
sensor_H = 64
sensor_W = 96
normalize_gain = 2
time_flip = 0
rand_aug = 0
max_random_shift_evs = 0
num_tokens = 32
num_layers = 3
vae_hidden_dim = 8
vae_num_resnet_blocks = 1
vae_epochs = 1
vae_batch_size = 8
transformer_emb = 24
transformer_depth = 4
transformer_heads = 2
masking = random
num_mask_patches = 48
pt_epochs = 1
pt_batch_size = 8
pt_warmup_steps = 1
class_methods =
seg_methods = pretrained scratch
seg_labels = 8
seg_classes = 6
seg_blocks = 1 2 3 4
seg_width = 16
seg_aux_width = 8
seg_steps = 10
seg_batch_size = 4
seg_lr = 2e-3
seg_warmup_steps = 2
seg_ema_decay = 0.9
seg_save_ckpt_freq = 4
log_every = 1
device = cpu
precision = fp32
"""

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "Scenes, a configuration, and a whole run."
    folder = tmp_path_factory.mktemp('segment')
    (folder/'x.conf').write_text(CONF)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        command('run', 'x.conf')
    return folder

@pytest.fixture
def here(root, monkeypatch):
    monkeypatch.chdir(root)
    return root

def cfg_of(*overrides): return load_config('x.conf', overrides)

# ---- data, in three layouts
def dsec(folder, events, size, classes=11, times=(60_000,110_000,160_000), where='semantic/left/{}classes/data', rng=np.random.default_rng(0)):
    "A sequence in DSEC-Semantic's layout."
    write_events((folder/'events'/'left').mkdir(parents=True) or folder/'events'/'left'/'events.h5', events, size)
    maps = folder/where.format(classes)
    maps.mkdir(parents=True)
    for k,_ in enumerate(times):
        m = rng.integers(0, classes, (size[0]*11//12, size[1])).astype(np.uint8); m[:5] = 255
        Image.fromarray(m).save(maps/f'{k:06d}.png')
    stamps = folder/'semantic'/'timestamps.txt' if 'semantic' in where else folder/f'{folder.name}_semantic_timestamps.txt'
    stamps.parent.mkdir(exist_ok=True)
    np.savetxt(stamps, np.array(times)+int(events['t'][0]), fmt='%d')

def shifted(t0):
    events = read_events(next(Path('scenes').glob('*/train/00000.bin'))).copy()
    events['t'] += t0
    return events

@pytest.mark.parametrize('classes,where', [(11,'semantic/left/{}classes/data'), (19,'semantic/{}classes/data'), (11,'{}classes')])
def test_dsec_windows_end_at_their_labels(here, tmp_path, classes, where):
    events = shifted(10**12)                    # DSEC counts from the start of the computer
    for split in ('train','test'): dsec(tmp_path/split/'zurich_city_00_a', events, (64,96), classes, where=where)
    items,wrong = list_labelled(tmp_path, 'dsec', classes)
    assert not wrong and len(items)==4          # the first label of a sequence is left out
    folder = pack_labelled(items, wrong, tmp_path/'packed', classes, rows=58, sensor=(64,96))
    train = LabelledSet(folder)
    assert train.size==(58,96) and (train.maps[:,:5]==255).all()
    end = items[0].end_us
    inside = events[(events['t']>=end-50_000)&(events['t']<end)]
    assert (train.store.events(0)['x']==inside['x']).all()
    assert train.batch([0]).frames(parse_config(CONF).data).shape==(1,3,58,96)

def test_dsec_layout_of_another_camera(here, tmp_path):
    "sensor_H and sensor_W hold for the labels of data_path; labels elsewhere, in seg_path, are of DSEC's own sensor."
    for split in ('train','test'): dsec(tmp_path/split/'a', shifted(10**12), (64,96))
    more = [f'data_path={tmp_path}', 'data_set=recordings', 'seg_layout=dsec', 'seg_classes=11', 'seg_rows=58', f'runs_dir={tmp_path}/runs']
    assert LabelledSet(labelled(cfg_of(*more))).size==(58,96)
    with pytest.raises(ValueError, match=r'its frame is \(58, 640\)'): labelled(cfg_of(*more, f'seg_path={tmp_path}'))

def test_a_real_recording_in_dsec_layout(shared, tmp_path):
    found = [p for p in (shared/'recordings'/'prophesee_raw').glob('*evt2*.raw')]
    events = read_events(found[0])
    span = int(events['t'][-1]-events['t'][0])
    for split in ('train','test'): dsec(tmp_path/split/'a', events, (480,640), times=(span//2, span))
    folder = pack_labelled(*list_labelled(tmp_path, 'dsec', 11), tmp_path/'packed', 11, rows=440, sensor=(480,640), window_us=20_000)
    b = LabelledSet(folder).batch([0])
    frames = b.frames(parse_config('slice_max_evs = 1000000').data)
    assert frames.shape==(1,3,440,640) and 0<=frames.min()<frames.max()<=1 and b.maps.shape==(1,440,640)

def images(folder, n=3, size=(30,40)):
    rng = np.random.default_rng(0)
    for split in ('train','val'):
        for kind in ('imgs','anns'): (folder/kind/split).mkdir(parents=True)
        for i in range(n):
            np.save(folder/'imgs'/split/f'{i}.npy', rng.integers(0, 256, (*size,3)).astype(np.uint8))
            Image.fromarray(rng.integers(0, 6, size).astype(np.uint8)).save(folder/'anns'/split/f'{i}.png')

def test_event_images_with_label_maps_of_the_same_names(tmp_path):
    images(tmp_path)
    folder = pack_labelled(*list_labelled(tmp_path, 'images', 6), tmp_path/'packed', 6)
    b = LabelledSet(folder, 'val').batch([0,2])
    a = np.load(tmp_path/'imgs'/'val'/'2.npy')
    assert torch.equal(b.frames(parse_config('').data)[1], torch.from_numpy(a).permute(2,0,1).float()/255)
    assert (b.maps[1].numpy()==np.array(Image.open(tmp_path/'anns'/'val'/'2.png'))).all()
    np.save(tmp_path/'float.npy', (a/255).astype(np.float32).transpose(2,0,1))
    assert np.allclose(read_image(tmp_path/'float.npy'), a.transpose(2,0,1)/255, atol=1e-6)

def test_scenes_are_hard_for_single_pixels_and_the_same_again(tmp_path):
    a,b = (film(World(), np.random.default_rng(5)) for _ in range(2))
    assert all((x==y).all() for x,y in zip(a, b))
    views,times,maps,ends = a
    assert views.shape[1:]==(64,96)==maps.shape[1:] and ends.tolist()==[50_000,100_000,150_000,200_000] and maps.max()<len(CLASSES)
    still = World(camera_px_s=0, thing_px_s=0, turn_rad_s=0)
    assert (film(still, np.random.default_rng(0))[2].std(0)==0).all()                  # nothing moves: one map
    assert (film(World(things=(0,0)), np.random.default_rng(0))[2]==0).all()             # no things: ground

@pytest.mark.parametrize('radius', [12.,20.])
def test_a_pattern_is_as_wide_as_drawn_on_a_thing_of_any_size(radius):
    surface = PATTERNS['square'](np.random.default_rng(0))
    thing = Thing(CLASSES.index('square'), np.array([32.,48.]), np.zeros(2), radius, 0., 0., 0., surface)
    picture,_ = paint([thing], np.zeros((128,192)), np.zeros(2), 0., (64,96))
    assert np.allclose(picture[32,40:56], surface[0,np.arange(-8, 8)])                  # once it was sampled a radius apart, and was noise

def films(folder): return {p.relative_to(folder):p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

def test_films_of_many_processes_are_those_of_one(tmp_path):
    world = World(size=(32,48), windows=1)
    one,two = (films(simulate_scenes(tmp_path/str(w), 14, 2, world=world, workers=w)) for w in (1,2))
    assert len(one)>=32 and one==two

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupted_films_go_on(tmp_path, number):
    code = "import sys; from mem_nb.scenes import simulate_scenes; simulate_scenes(sys.argv[1], 40, 1, workers=2)"
    run = subprocess.Popen([sys.executable, '-c', code, tmp_path/'cut'], start_new_session=True, stderr=subprocess.DEVNULL)
    while len(list((tmp_path/'cut').glob('train/*.bin')))<5: assert run.poll() is None; time.sleep(.02)
    run.send_signal(number)
    assert run.wait(30)!=0
    def alive():
        try: os.killpg(run.pid, 0); return True
        except ProcessLookupError: return False
    began = time.time()
    while alive() and time.time()-began<20: time.sleep(.05)
    assert not alive() and len(list((tmp_path/'cut').glob('train/*.bin')))<40                # no worker stays behind
    for name in ('cut','whole'): simulate_scenes(tmp_path/name, 40, 1)
    assert films(tmp_path/'cut')==films(tmp_path/'whole')

# ---- bad input: refused with the file and what to do
def bad(folder, change, layout='recordings', classes=6, **kwargs):
    "The error after `change(folder)`."
    simulate_scenes(folder, 3, 1) if layout=='recordings' else images(folder)
    change(folder)
    with pytest.raises(ValueError) as e: pack_labelled(*list_labelled(folder, layout, classes), folder/'packed', classes, **({'sensor':(64,96)} if layout=='recordings' else {}), **kwargs)
    assert not (folder/'packed'/'labels.json').exists()
    return str(e.value)

def save(path, a): Image.fromarray(np.asarray(a, np.uint8)).save(path)

def test_a_label_map_of_another_size(tmp_path):
    said = bad(tmp_path, lambda f: save(f/'train'/'00000'/'50000.png', np.zeros((60,96))))
    assert '00000/50000.png' in said and '(60, 96)' in said and '(64, 96)' in said and 'seg_rows' in said

def test_a_label_value_outside_the_classes(tmp_path):
    said = bad(tmp_path, lambda f: save(f/'val'/'00000'/'100000.png', np.full((64,96), 17)))
    assert 'val/00000/100000.png: label 17' in said and 'seg_classes' in said

def test_an_image_without_a_label_and_the_reverse_are_each_listed(tmp_path):
    def change(f):
        (f/'anns'/'train'/'0.png').unlink(); (f/'anns'/'train'/'1.png').unlink(); (f/'imgs'/'val'/'2.npy').unlink()
    said = bad(tmp_path, change, 'images')
    assert said.startswith('3 faults') and all(f'{k}' in said for k in ('imgs/train/0.npy: no label map','imgs/train/1.npy: no label map','anns/val/2.png: no image'))

def test_a_file_without_a_partner_is_told_after_the_first_packing_too(tmp_path):
    images(tmp_path)
    again = lambda: pack_labelled(*list_labelled(tmp_path, 'images', 6), tmp_path/'packed', 6)
    assert again()==again()
    np.save(tmp_path/'imgs'/'train'/'new.npy', np.zeros((30,40,3), np.uint8))
    with pytest.raises(ValueError, match='imgs/train/new.npy: no label map'): again()
    (tmp_path/'imgs'/'train'/'new.npy').unlink()
    assert again()==tmp_path/'packed'

def test_files_of_other_endings_are_not_passed_over(tmp_path):
    def change(f):
        save(f/'imgs'/'train'/'8.jpg', np.zeros((30,40,3))); save(f/'imgs'/'train'/'0.png', np.zeros((30,40,3))); save(f/'anns'/'val'/'9.tif', np.zeros((30,40)))
        (f/'imgs'/'train'/'1.npy').write_bytes(b'damaged'); save(f/'imgs'/'train'/'2.PNG', np.zeros((30,40,3))); (f/'imgs'/'train'/'2.npy').unlink()
    said = bad(tmp_path, change, 'images')
    for word in ('train/8.jpg: event images are .npy or .png', 'train/0.npy: 0.png has the same name', 'val/9.tif: label maps are .png', 'train/1.npy: no readable event image'): assert word in said
    assert said.startswith('4 faults') and '2.PNG' not in said   # an ending may be written in capitals

def test_a_recording_without_maps_and_the_reverse_are_each_listed(tmp_path):
    def change(f):
        (f/'train'/'00000.bin').unlink(); [p.unlink() for p in (f/'train'/'00001').iterdir()]
    said = bad(tmp_path, change)
    assert '2 faults' in said and 'train/00001.bin: no label maps' in said and 'train/00000: label maps without a recording' in said

@pytest.mark.parametrize('time,word', [(900_000,'after the end of'), (0,'before the first event')])
def test_a_label_time_outside_of_the_recording(tmp_path, time, word):
    said = bad(tmp_path, lambda f: (f/'train'/'00000'/'50000.png').rename(f/'train'/'00000'/f'{time}.png'))
    assert f'00000/{time}.png: its time {time} µs lies {word}' in said and '00000.bin' in said

def test_a_window_without_events(tmp_path):
    def change(f):
        e = read_events(f/'train'/'00000.bin')
        write_events(f/'train'/'00000.bin', e[(e['t']<51_000)|(e['t']>=100_000)], (64,96))
    said = bad(tmp_path, change, window_us=40_000)
    assert '00000.bin before 100000.png' in said and 'no events; move this label map away' in said

def test_a_damaged_recording_is_one_line_of_the_list(tmp_path):
    def change(f):
        (f/'train'/'00000.bin').write_bytes(b'123'); save(f/'val'/'00000'/'100000.png', np.full((64,96), 17))
    said = bad(tmp_path, change)
    assert said.startswith('2 faults') and 'train/00000.bin' in said and 'val/00000/100000.png: label 17' in said

def test_a_map_in_colour_and_an_image_of_another_size(tmp_path):
    def change(f):
        save(f/'anns'/'train'/'0.png', np.zeros((30,40,3))); np.save(f/'imgs'/'train'/'1.npy', np.zeros((31,40,3), np.uint8))
    said = bad(tmp_path, change, 'images')
    assert 'anns/train/0.png: a label map has one channel' in said and 'imgs/train/1.npy: image of (H, W) = (31, 40)' in said

def test_dsec_names_what_a_sequence_lacks(here, tmp_path):
    for split in ('train','test'): dsec(tmp_path/split/'a', shifted(0), (64,96))
    (tmp_path/'train'/'a'/'semantic'/'left'/'11classes'/'data'/'000002.png').unlink()
    (tmp_path/'test'/'a'/'semantic'/'timestamps.txt').unlink()
    for name,lines in dict(b='1\nabc\n3\n', c='5\n5\n6\n').items():
        dsec(tmp_path/'train'/name, shifted(0), (64,96)); (tmp_path/'train'/name/'semantic'/'timestamps.txt').write_text(lines)
    dsec(tmp_path/'train'/'d', shifted(0), (64,96), times=(60_000,))
    wrong = list_labelled(tmp_path, 'dsec', 11)[1]
    for word in ('b/semantic/timestamps.txt: not a whole number', 'c/semantic/timestamps.txt: line 2 is no later', 'data: 1 label maps'):
        one, = (w for w in wrong if word in w); wrong.remove(one)
    assert len(wrong)==2 and '3 times for 2 label maps' in wrong[0] and 'test/a: no semantic/timestamps.txt' in wrong[1]

def test_a_checkpoint_whose_encoder_differs(here):
    start = 'seg_checkpoint=runs/run/pretrain/final.safetensors'
    with pytest.raises(ValueError, match='final.safetensors come from another model'): segment(cfg_of(start, 'transformer_emb=48', 'expname=other', 'seg_methods=pretrained'))
    with pytest.raises(FileNotFoundError, match='mem_nb pretrain'): segment(cfg_of('expname=none', 'seg_methods=pretrained'))
    with pytest.raises(ValueError, match='another configuration'): load_segmenter(cfg_of('seg_width=32'), 'scratch', 8, 0)

@pytest.mark.parametrize('words,said', [('seg_blocks=1 2 3', 'four ascending'), ('seg_blocks=1 2 3 3', 'transformer_depth = 4'), ('seg_ignore=3', 'seg_ignore'), ('seg_H=60', 'multiples of the patch'),
    ('seg_methods=mae', 'seg_methods'), ('seg_loss=l2', 'known: ce, focal, dice'), ('seg_overlap=1', 'seg_overlap'), ('seg_names=a b', 'seg_names has 2'), ('seg_seeds=x', 'seg_seeds'), ('seg_seeds=', 'at least one each'), ('seg_labels=', 'at least one each'), ('seg_rows=-1', 'seg_rows = -1')])
def test_settings_that_cannot_be(here, words, said):
    with pytest.raises(ValueError, match=said): cfg_of(words)

@pytest.mark.parametrize('words,said', [(('seg_labels=8 500',), 'asks for 500 labelled frames, there are'), (('seg_batch_size=5', 'seg_update_freq=2'), 'multiple of seg_update_freq'),
    (('seg_batch_size=4', 'seg_update_freq=4'), 'seg_norm = batch needs 2'), (('seg_checkpoint=nowhere.safetensors',), 'seg_checkpoint'), (('seg_path=empty',), 'no folder empty/train')])
def test_what_segmentation_refuses_is_said_before_the_pretraining(here, words, said):
    name = f'early{abs(hash(words))}'
    with pytest.raises((ValueError,FileNotFoundError), match=said): command('run', 'x.conf', [*words, f'expname={name}'])
    assert not Path('runs', name, 'tokenizer').exists() and not Path('runs', name, 'segment').exists()

def test_images_want_three_channels(here):
    with pytest.raises(ValueError, match='histograms of three channels'): cfg_of('seg_layout=images', 'representation=voxel')

# ---- the model
def test_the_originals_segmentation_is_a_start(tmp_path):
    "With `seg_original = 1`: encoder and pyramid, not the heads."
    cfg = parse_config(CONF, ['seg_original=1', 'num_layers=4', 'transformer_emb=12', 'seg_finest=4', 'num_mask_patches=12'])
    trained,new = (build_segmenter(cfg) for _ in range(2))
    for v in trained.state_dict().values(): v.copy_(torch.rand(v.shape)) if v.is_floating_point() else None
    own = {k.removeprefix('encoder.').removeprefix('pyramid.'):v for k,v in trained.state_dict().items() if k.startswith(('encoder.','pyramid.'))}
    torch.save(dict(state_dict={f'backbone.{k}':v for k,v in own.items()} | {'decode_head.conv_seg.weight':torch.zeros(1)}, meta=dict(epoch=1)), tmp_path/'iter_1.pth')
    load_backbone(new, tmp_path/'iter_1.pth', cfg.grid)
    got = new.state_dict()
    for k,v in trained.state_dict().items(): assert torch.equal(v, got[k])==k.startswith(('encoder.','pyramid.')) or v.numel()==1 or 'running' in k, k
    del own['blocks.0.gamma_1']; torch.save(dict(state_dict=own), tmp_path/'cut.pth')
    with pytest.raises(ValueError, match='cut.pth.*missing: blocks.0.gamma_1'): load_backbone(new, tmp_path/'cut.pth', cfg.grid)

def test_backbone_features_are_the_originals(shared):
    z = np.load(shared/'golden'/'evbeit.npz')
    state = {k[3:]:torch.from_numpy(z[k]) for k in z.files if k.startswith('sd/')}
    model = original_backbone(dict(state_dict={f'backbone.{k}':v for k,v in state.items()}), (1,2,3,4), width=8, aux_width=0)
    x = torch.from_numpy(z['x_u8']).float()/255
    # our model swaps and scales as the original's loader did before; its backbone saw what is given here
    with torch.no_grad(): f = model.levels((x/255).flip(1))
    assert [tuple(v.shape) for v in f]==[tuple(z[f'f{k}_shape']) for k in range(4)]
    for k,(got,want) in enumerate([(f[0][:,:,::8,::8],z['f0_sub']), (f[1][:,:,::4,::4],z['f1_sub']), (f[2][:,:,::4,::4],z['f2_sub']), (f[3],z['f3'])]):
        assert np.abs(got.numpy()-want).max()<2e-5*max(1, np.abs(want).max()), k
        assert [float(f[k].mean()), float(f[k].std())]==pytest.approx(z[f'f{k}_mean_std'], rel=1e-3, abs=1e-5)
    torch.manual_seed(1)
    corner = original_input((torch.rand(1,3,600,700)/255).flip(1))[...,:16,:16]
    assert np.abs(corner.numpy()-z['resize_down_corner']).max()<1e-5
    with pytest.raises(ValueError, match='no fpn1'): original_backbone({k:v for k,v in state.items() if 'fpn' not in k})

def test_frames_are_not_squeezed_and_pretrained_positions_are_stretched(here):
    model = build_segmenter(cfg_of('seg_H=48', 'seg_W=112'))
    assert model.window==(48,112) and model.encoder.patch_embed.grid_size==(6,14)
    load_backbone(model, 'runs/run/pretrain/final.safetensors', (8,12))
    table = model.encoder.blocks[0].attn.relative_position_bias_table
    assert table.shape==(11*27+3, 2)
    assert [tuple(f.shape[2:]) for f in model.eval().levels(torch.rand(1,3,48,112))]==[(24,56),(12,28),(6,14),(3,7)]
    square = build_encoder((32,32), 8, 3, 24, 4, 2).state_dict()
    load_backbone(model, square, (8,12))                                    # its grid is told by its own table

def test_the_class_token_is_no_place_and_every_weight_learns(here):
    model = build_segmenter(cfg_of()).train()
    logits,side = model.forward_both(torch.rand(2,3,64,96))
    assert logits.shape==side.shape==(2,6,64,96)
    (logits.sum()+side.sum()).backward()
    assert [n for n,p in model.named_parameters() if p.grad is None]==[]

@pytest.mark.parametrize('size', [(64,96), (20,30), (65,97), (130,96), (150,200)])
def test_any_size_goes_in_and_comes_out(here, size):
    model,x = build_segmenter(cfg_of()).eval(),torch.rand(1,3,*size)
    p = predict_frames(model, x)
    assert p.shape==(1,6,*size) and torch.allclose(p.sum(1), torch.ones(1,*size), atol=1e-5)
    if size==(64,96): assert torch.allclose(p, model(x).softmax(1))

@pytest.mark.parametrize('length,window,overlap', [(64,64,.3), (65,64,0.), (640,96,.33), (1000,64,.9)])
def test_windows_cover_every_pixel_and_overlap_enough(length, window, overlap):
    at = window_places(length, window, overlap)
    assert at[0]==0 and at[-1]==length-window and all(0<b-a<=max(1, np.ceil(window*(1-overlap))) for a,b in zip(at, at[1:]))

def test_the_decoder_is_that_of_smp(here):
    from mem_nb.pyramid import _decode
    model = build_segmenter(load_config('x.conf')).double().eval()
    levels = [x.detach() for x in model.levels(torch.rand(2, 3, 64, 96, dtype=torch.float64))]
    found = []
    for decode in (_decode, lambda decoder,x: decoder([None, None, *x])):
        y = decode(model.decoder, levels)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), model.decoder.parameters())])
    assert len(found[0])>20
    for a,b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('width,last', [(64,True),(256,False)])
def test_narrow_decoders_lie_channels_last(here, width, last):
    model = build_segmenter(load_config('x.conf', [f'seg_width={width}']))
    assert model.decoder.fusion_block[0].weight.is_contiguous(memory_format=torch.channels_last) is last

def test_layer_decay_reaches_every_part(here):
    groups = segmenter_optimizer(build_segmenter(cfg_of()), 1., .05, .5).param_groups
    assert sorted({g.get('lr_scale',1.) for g in groups})==pytest.approx([.5**k for k in range(5,-1,-1)])

def test_group_norm_lets_one_frame_stand_alone(here):
    torch.manual_seed(0)
    model,x = build_segmenter(cfg_of('seg_norm=group', 'seg_dropout=0')).train(),torch.rand(3,3,64,96)
    together,alone = model.forward_both(x)[0],model.forward_both(x[:1])[0]
    assert torch.allclose(together[:1], alone, atol=1e-5)
    with pytest.raises(ValueError, match='seg_norm = group'): segment(cfg_of('seg_batch_size=1', 'expname=one', 'seg_methods=scratch'))

# ---- what training keeps
@pytest.mark.parametrize('patch', [2,4,8,16])
def test_convolutions_stand_beside_the_patches(here, patch):
    cfg = cfg_of(f'num_layers={patch.bit_length()-1}', 'seg_stem=8', 'num_mask_patches=4')
    model,bare = build_segmenter(cfg).eval(),build_encoder((64,96), patch, 3, 24, 4, 2)
    with torch.no_grad(): bare.rel_pos_bias.relative_position_bias_table.normal_()
    load_backbone(model, bare.state_dict(), cfg.grid)                  # a pretraining knows of no stem
    x,embed = torch.rand(2,3,64,96),model.encoder.patch_embed
    with torch.no_grad():
        assert torch.allclose(embed(x)-bare.patch_embed(x), embed.stem(x).flatten(2).transpose(1,2), atol=1e-5)
        said = model(x); embed.stem[-1].weight.zero_(); embed.stem[-1].bias.zero_()
        assert not torch.allclose(said, model(x)) and torch.equal(embed(x), bare.patch_embed(x))
    groups = segmenter_optimizer(model, 1., .05, .5).param_groups
    rate = {id(p):g.get('lr_scale', 1.) for g in groups for p in g['params']}
    assert {rate[id(p)] for p in embed.stem.parameters()}=={1.} and rate[id(embed.proj.weight)]==.5**5 and len(rate)==sum(len(g['params']) for g in groups)==len(list(model.parameters()))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in build_segmenter(cfg_of('seg_stem=8', 'seg_norm=group')).modules())
    with pytest.raises(ValueError, match='seg_stem'): cfg_of('seg_stem=8', 'seg_original=1')
    build_segmenter(cfg_of('seg_stem=1', 'seg_norm=group'))

def test_weights_with_a_stem_start_another_segmentation(here):
    model,again = (build_segmenter(cfg_of('seg_stem=8')).eval() for _ in range(2))
    grid,x = cfg_of().grid,torch.rand(1,3,64,96)
    load_backbone(again, model.state_dict(), grid)
    with torch.no_grad(): assert torch.equal(again.encoder.patch_embed(x), model.encoder.patch_embed(x))
    with pytest.raises(ValueError, match='same seg_stem'): load_backbone(build_segmenter(cfg_of()), model.state_dict(), grid)
    with pytest.raises(ValueError, match='misshapen.*same seg_stem'): load_backbone(build_segmenter(cfg_of('seg_stem=16')), model.state_dict(), grid)

@pytest.mark.parametrize('width', [8,64])
def test_a_stem_is_quiet_at_first(here, width):
    embed = build_segmenter(cfg_of(f'seg_stem={width}')).eval().encoder.patch_embed
    x = torch.rand(4,3,64,96)*(torch.rand(4,3,64,96)<.2)
    with torch.no_grad(): assert embed.stem(x).square().mean() < .3*embed.proj(x).square().mean()

def test_flips_move_labels_and_events_together(here):
    data = LabelledSet(labelled(cfg_of()))
    b = data.batch(range(4))
    frames = b.frames(cfg_of().data)
    g = lambda: torch.Generator().manual_seed(0)
    f,m = same_place(frames, b.maps, None, 1., slice(0,4), 4, g())
    mirrored = LabelBatch(flip_x(b.events.unpack(), 1., g()), None, b.maps.flip(2))
    assert torch.allclose(f, mirrored.frames(cfg_of().data), atol=1e-6) and torch.equal(m, mirrored.maps)
    half = [same_place(frames[s], b.maps[s], (48,64), .5, s, 4, g()) for s in (slice(0,2),slice(2,4))]    # two processes cut and flip as one
    whole = same_place(frames, b.maps, (48,64), .5, slice(0,4), 4, g())
    assert torch.equal(torch.cat([h[0] for h in half]), whole[0]) and torch.equal(torch.cat([h[1] for h in half]), whole[1])

def test_things_are_copied_with_their_labels():
    g = lambda seed=3: torch.Generator().manual_seed(seed)
    maps = torch.zeros(4, 20, 30, dtype=torch.uint8); maps[1,5:9,10:17] = 2; maps[3,0:3,0:4] = 1; maps[3,10:12] = 3; maps[:,18:] = 255
    frames = maps[:,None].float().repeat(1,3,1,1)                     # frames that hold their own labels
    f,m = paste_things(frames, maps, 1., (1,2), slice(0,4), 4, g())
    assert torch.equal(f[:,1], m.float())
    extra = lambda k,c: int((m[k]==c).sum()-(maps[k]==c).sum())
    assert extra(2,2)==28 and extra(0,1)==12 and extra(0,3)<=0 and torch.equal(m[[1,3]]==0, maps[[1,3]]==0)   # of the one before, and no other class
    places = [paste_things(frames, maps, 1., (2,), slice(0,4), 4, g(s))[1][2] for s in range(40)]
    assert len({tuple(p.flatten().tolist()) for p in places})>35                                           # moved
    own = torch.zeros(2, 8, 9); own[0,:,0],own[0,:,1] = 1,2                                                # a thing of two colours
    sides = []
    for s in range(20):
        row = paste_things(own[:,None], torch.tensor([[1.,1]+[0]*7,[0]*9])[:,None].repeat(1,8,1).byte(), 1., (1,), slice(0,2), 2, g(s))[0][1,0,0].tolist()
        sides.append((row.index(2)-row.index(1))%9)
    assert set(sides)=={1,8}                                                                               # mirrored or not
    few = sum(torch.equal(paste_things(frames, maps, .25, (2,), slice(0,4), 4, g(s))[1][2], maps[2]) for s in range(200))
    assert 130<few<170 and torch.equal(paste_things(frames, maps, 0., (1,2,3), slice(0,4), 4, g())[1], maps)
    unlabelled = maps.clone(); unlabelled[2] = 255
    assert torch.equal(paste_things(frames, unlabelled, 1., (1,2), slice(0,4), 4, g())[1][2], unlabelled[2])
    for words in (['seg_paste=.5', 'seg_paste_classes=6'], ['seg_paste_classes=1']):
        with pytest.raises(ValueError, match='seg_paste_classes'): parse_config(CONF, words)
    with pytest.raises(ValueError, match='another frame'): frames_a_pass(parse_config(CONF, ['seg_paste=.5', 'seg_norm=group', 'seg_update_freq=4']).segment)

def test_classes_have_colours_of_their_own():
    for n in (2,6,11,19,64): assert class_colors(n).shape==(n,3) and np.array_equal(class_colors(64)[:n], class_colors(n))
    far = np.linalg.norm(class_colors(19)[:,None]-class_colors(19), axis=2)+np.eye(19)
    assert far.min()>.2

@pytest.mark.parametrize('kind', ['ce','focal','dice'])
def test_the_ignored_label_never_counts(kind):
    g = torch.Generator().manual_seed(0)
    logits,maps = torch.randn(2,4,9,11, generator=g, requires_grad=True),torch.randint(0, 4, (2,9,11), generator=g)
    maps[:,:4] = 255
    pixel_loss(logits, maps, kind, torch.tensor([1.,2,3,4])).backward()
    assert (logits.grad[:,:,:4]==0).all() and (logits.grad[:,:,4:]!=0).any()
    logits.grad = None
    empty = pixel_loss(logits, torch.full_like(maps, 255), kind); empty.backward()
    assert empty==0 and torch.isfinite(logits.grad).all()

def test_the_schedule_rises_and_falls_in_a_line():
    rates = [poly_schedule(k, 100, 1., 0., 10) for k in range(100)]
    assert np.argmax(rates)==10 and np.allclose(np.diff(rates[10:]), -.01) and all(a<b for a,b in zip(rates[:10], rates[1:11]))
    assert poly_schedule(50, 100, 1., power=2.)==pytest.approx(.25)

STOP = """
import sys
from mem_nb import train
from mem_nb.pipeline import main
original = train.train_step
def train_step(acc, state, *args):
    if state.step==7: raise KeyboardInterrupt
    return original(acc, state, *args)
train.train_step = train_step
main(['segment', 'x.conf', 'expname=broken', 'seg_methods=scratch'])
"""

def test_a_broken_training_ends_as_an_unbroken_one(here):
    env = dict(os.environ, PYTHONPATH=str(ROOT), TQDM_DISABLE='1', OMP_NUM_THREADS=str(torch.get_num_threads()))   # sums depend on it
    subprocess.run([sys.executable, '-c', STOP], env=env, capture_output=True)
    state = Path('runs/broken/segment/scratch_8_seed0/last/state.pt')
    assert state.exists()
    status = run_status(Path('runs/broken'), ['segment'], dict(segment=1))
    assert status['state']!='done' and status['step']=='segment/scratch_8_seed0'
    for name in ('broken','unbroken'): command('segment', 'x.conf', [f'expname={name}', 'seg_methods=scratch'])
    a,b = (Path('runs', name, 'segment/scratch_8_seed0/final.safetensors').read_bytes() for name in ('broken','unbroken'))
    assert a==b and finished(Path('runs/broken'), 'segment', dict(segment=1)) and not finished(Path('runs/broken'), 'segment', 2)

def test_a_run_goes_through_segmentation_and_predicts(here, capsys):
    assert steps_of(cfg_of())==['prepare','tokenizer','pretrain','segment'] and 'segment' not in steps_of(parse_config(''))
    for method in ('pretrained','scratch'):
        log = read_log(f'runs/run/segment/{method}_8_seed0')
        assert {'val_miou','val_boundary_f','val_accuracy','val_mean_accuracy','val_iou_ground'} <= log[-1].keys() and len(log)==10
    recording = next(Path('scenes').glob('*/val/00000.bin'))
    command('predict', 'x.conf', [f'recording={recording}', 'out=seen'])
    assert 'frames/s' in capsys.readouterr().out and Path('seen/overlay.gif').exists() and len(list(Path('seen').glob('*.png')))==4
    with Image.open('seen/overlay.gif') as gif: assert gif.n_frames==4
    with pytest.raises(ValueError, match='recording=FILE'): command('predict', 'x.conf')
    # a finished one answers at once; another setting is refused
    with pytest.raises(ValueError, match='seg_lr was'): command('segment', 'x.conf', ['seg_lr=1'])

def test_predict_knows_the_sensor_of_the_data_set(here, tmp_path):
    "What `segment` took, `predict` takes: films of the scenes, and DSEC's files, whose format tells no size."
    text = '\n'.join(l for l in CONF.splitlines() if not l.startswith('sensor_'))
    Path('bare.conf').write_text(text)
    recording = next(Path('scenes').glob('*/val/00000.bin'))
    for word in ('out=bare', 'out=bare'): command('predict', 'bare.conf', [f'recording={recording}', word])
    assert len(list(Path('bare').glob('*.png')))==4 and '#' in Path('bare/classes.txt').read_text()
    Path('bare/7.png').write_bytes(b'mine'); Path('mine.txt').write_bytes(b'mine')
    with open('bare/.written.txt', 'a') as f: f.write('../mine.txt\n')
    command('predict', 'bare.conf', [f'recording={recording}', 'out=bare', 'seg_window_us=100000'])  # maps of other windows would lie beside these
    assert Path('bare/7.png').exists() and Path('mine.txt').exists() and len(list(Path('bare').glob('*.png')))==3
    import h5py
    with h5py.File(tmp_path/'events.h5', 'w') as f:
        e = read_events(recording, size=(64,96))
        for k in 'xytp': f[f'events/{k}'] = e[k].astype(dict(x='u2', y='u2', t='u4', p='u1')[k])
        f['t_offset'] = 0; f['ms_to_idx'] = np.searchsorted(e['t'], 1000*np.arange(e['t'][-1]//1000+1)).astype('u8')
    cfg = load_config('bare.conf', ['data_set=dsec', 'seg_layout=dsec'])
    assert recording_size(tmp_path/'events.h5') is None and known_sensor(cfg)==(480,640)
    assert known_sensor(load_config('x.conf'))==(64,96) and given_sensor(cfg) is None

def test_a_long_film_is_thinned_evenly():
    film = Film(4)
    for k in range(19): film.add(np.full((1,1,3), k/255))
    assert [int(p[0,0,0]) for p in film.pictures]==[0,8,16] and film.seen==19

def test_a_leap_in_time_is_refused(here, tmp_path):
    e = read_events(next(Path('scenes').glob('*/val/00000.bin'))).copy()
    e['t'][-5:] += 10**12
    write_events(tmp_path/'leap.h5', e, (64,96))
    with pytest.raises(ValueError, match='leap.h5: no event between .* are all times of one clock'): list(recording_windows(tmp_path/'leap.h5', 50_000))

def test_training_on_images_learns_their_frames(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    images(Path('pairs'), 4, (64,96))
    records = segment(load_config(root/'x.conf', ['seg_path=pairs', 'seg_layout=images', 'seg_methods=scratch', 'seg_labels=all', 'seg_steps=2', 'seg_loss=dice', 'seg_class_weights=1']))
    assert records[0]['n_labels']==4 and 0<=records[0]['miou']<1

def test_a_recording_is_cut_by_time_whatever_the_pieces(here):
    path = next(Path('scenes').glob('*/val/00000.bin'))
    events,windows = read_events(path),list(recording_windows(path, 30_000))
    assert (np.concatenate([e for e,_ in windows])==events).all()
    for e,end in windows: assert not len(e) or end-30_000<=e['t'][0] and e['t'][-1]<end
    found = predict_recording(build_segmenter(cfg_of()).eval(), path, cfg_of().data, most=2)
    assert found.maps.shape==(2,64,96) and found.frames_s>0

# ---- metrics
@pytest.mark.parametrize('seed', range(4))
def test_metrics_agree_with_torchmetrics_and_plain_counting(seed):
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex
    g = torch.Generator().manual_seed(seed)
    n = 3+seed
    true,said = (torch.randint(0, n-(seed==3), (3,17,23), generator=g) for _ in range(2))     # once, a class that occurs nowhere
    true[torch.rand(true.shape, generator=g)<.2] = 255
    found = overlap_scores(c := confusion_matrix(said, true, n))
    assert torch.equal(c, MulticlassConfusionMatrix(n, ignore_index=255)(said, true))
    assert float(found['miou'])==pytest.approx(float(MulticlassJaccardIndex(n, ignore_index=255)(said, true)), abs=1e-6)
    assert float(found['accuracy'])==pytest.approx(float(MulticlassAccuracy(n, average='micro', ignore_index=255)(said, true)), abs=1e-6)
    s,t = said.numpy(),true.numpy()
    for k in range(n):
        both,either = ((s==k)&(t==k)).sum(),((t!=255)&((s==k)|(t==k))).sum()
        assert np.isnan(float(found['iou'][k])) if not either else float(found['iou'][k])==pytest.approx(both/either)
    recall = [((s==k)&(t==k)).sum()/(t==k).sum() for k in range(n) if (t==k).any()]
    assert float(found['mean_accuracy'])==pytest.approx(np.mean(recall))

def test_edges_by_plain_counting():
    rng = np.random.default_rng(0)
    s,t = (np.kron(rng.integers(0, 3, (4,5)), np.ones((5,5), int)) for _ in range(2))
    t[3:6,8:12] = 255
    h,w = t.shape
    def edge(m, k): return {(i,j) for i in range(h) for j in range(w) if t[i,j]!=255 and m[i,j]==k
                            and any(0<=a<h and 0<=b<w and t[a,b]!=255 and m[a,b]!=k for a in range(i-1,i+2) for b in range(j-1,j+2))}
    got = boundary_counts(torch.tensor(s)[None], torch.tensor(t)[None], 3, near=2)
    for k in range(3):
        a,b = edge(s, k),edge(t, k)
        close = lambda p,other: any(max(abs(p[0]-q[0]), abs(p[1]-q[1]))<=2 for q in other)
        want = [sum(close(p, b) for p in a), len(a), sum(close(p, a) for p in b), len(b)]
        assert got[:,k].tolist()==want
        precision,recall = want[0]/want[1],want[2]/want[3]
        assert float(boundary_f(got)[k])==pytest.approx(2*precision*recall/(precision+recall))

TWO = """
import torch, torch.distributed as dist
from mem_nb.overlap import SegmentationScore
from mem_nb.segment import dice_loss, pixel_loss
dist.init_process_group('gloo')
g = torch.Generator().manual_seed(0)
true,said = (torch.randint(0, 4, (6,20,30), generator=g) for _ in range(2)); true[:4,:15] = 255
logits = torch.randn(6,4,20,30, generator=g)
own = slice(0,3) if dist.get_rank()==0 else slice(3,6)
score,whole = SegmentationScore(4),SegmentationScore(4, sync_on_compute=False)
score.update(said[own], true[own]); whole.update(said, true)
for k,v in score.compute().items(): assert torch.allclose(v, whole.compute()[k]), k
part = pixel_loss(logits[own], true[own], weights=torch.tensor([1.,2,3,4]))
dist.all_reduce(part); want = torch.nn.functional.cross_entropy(logits, true, torch.tensor([1.,2,3,4]), ignore_index=255)
assert torch.allclose(part/2, want, atol=1e-6), (part/2, want)
x = logits.clone().requires_grad_(True)
dice = dice_loss(x[own], true[own]); dice.backward(); dist.all_reduce(x.grad)      # what DDP does, which also divides
p,t = logits.double().requires_grad_(True),torch.nn.functional.one_hot(true.clamp(max=3), 4).permute(0,3,1,2)*(true!=255)[:,None]
q = p.softmax(1)*(true!=255)[:,None]; want = (1-2*(q*t).sum((0,2,3))/(q+t).sum((0,2,3))).mean(); want.backward()
assert torch.allclose(dice.double(), want, atol=1e-6) and torch.allclose(x.grad.double()/2, p.grad, atol=1e-7), (dice, want)
print('as one')
"""

def test_two_processes_count_and_weigh_as_one(tmp_path):
    (tmp_path/'two.py').write_text(TWO)
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', 'two.py'], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.count('as one')==2, done.stderr[-2000:]

COMMAND = """
import os, signal, sys
from mem_nb import train
from mem_nb.config import process_rank
from mem_nb.pipeline import command
step,dies = train.train_step,sys.argv[1]=='die'
def train_step(acc, state, *args):
    if dies and state.step==3 and process_rank()[0]==1: os.kill(os.getpid(), signal.SIGKILL)
    return step(acc, state, *args)
train.train_step = train_step
for words in sys.argv[2:]: command('segment', 'x.conf', words.split())
"""

def test_two_processes_and_a_model_shared_out_take_the_steps_of_one(tmp_path, monkeypatch):
    "Batch norm and group norm; killed, what is shared out goes on to the same bits."
    monkeypatch.chdir(tmp_path)
    Path('x.conf').write_text(CONF); Path('run.py').write_text(COMMAND)
    words = 'seg_methods=scratch seg_steps=4 seg_dropout=0.2 seg_paste=0.7 seg_stem=8 log_every=1 seg_save_ckpt_freq=2'
    for norm in ('batch','group'): command('segment', 'x.conf', f'{words} seg_norm={norm} expname=one_{norm}'.split())
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', TQDM_DISABLE='1')
    def two(*said):
        return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', 'run.py', *said],
                              env=env, capture_output=True, text=True, timeout=600)
    runs = {f'{name}_{norm}':f'{words} seg_norm={norm} expname={name}_{norm} shard={shard}' for norm in ('batch','group') for name,shard in (('two',0),('cut',1))}
    done = two('live', *runs.values())
    assert done.returncode==0, done.stderr[-3000:]
    folder = lambda name: Path('runs', name, 'segment', 'scratch_8_seed0')
    for name in runs:
        want,logs = (read_log(folder(n)) for n in (f"one_{name.split('_')[1]}", name))
        for a,b in zip(want, logs, strict=True): assert b['loss']==pytest.approx(a['loss'], rel=1e-5 if a['step']==1 else 1e-4), (name, a['step'])
        assert logs[-1]['val_miou']==pytest.approx(want[-1]['val_miou'], abs=1e-3)
    again = runs['cut_batch'].replace('expname=cut_batch', 'expname=killed')
    assert two('die', again).returncode and read_state(folder('killed')/'last'/'state.pt')['step']==2 and two('live', again).returncode==0
    assert (folder('killed')/'final.safetensors').read_bytes()==(folder('cut_batch')/'final.safetensors').read_bytes()

# ---- the decoder's pretraining
DENSE = 'seg_decoder_epochs=1 seg_decoder_batch_size=4 vae_skip=1 vae_checkpoint=runs/run/tokenizer/final.safetensors pt_skip=1 pt_checkpoint=runs/run/pretrain/final.safetensors'.split()

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_a_segmentation_begins_from_a_pretrained_decoder(here):
    cfg = load_config('x.conf', [*DENSE, 'expname=dense', 'seg_steps=1', 'seg_warmup_steps=0', 'seg_lr=1e-12', 'seg_weight_decay=0', 'seg_ema_decay=0'])
    segment(cfg)
    before,after,begun = (read_weights(cfg.folder/name) for name in ('segment/decoder', 'segment/pretrained_8_seed0', 'segment/scratch_8_seed0'))
    learned = [k for k in after if k.startswith(('encoder.','pyramid.','decoder.')) and 'running' not in k and 'num_batches' not in k]
    assert any(k.startswith('decoder.') for k in learned)
    for k in learned: torch.testing.assert_close(after[k], before[f'segmenter.{k}'], rtol=0, atol=1e-9)
    assert all(not torch.equal(begun[k], after[k]) for k in learned if k.endswith('.weight') and k.startswith('decoder.') and after[k].ndim>1)
    encoder = read_weights('runs/run/pretrain')
    assert not torch.equal(before['segmenter.encoder.blocks.3.mlp.fc1.weight'], encoder['encoder.blocks.3.mlp.fc1.weight'])       # it went on learning
    log = read_log(cfg.folder/'segment'/'decoder')
    assert log[-1]['step']==len(EventStore(prepared(cfg)))//4 and {'val_masked_accuracy','val_commonest'} <= log[-1].keys()

def test_the_decoders_pretraining_goes_on_where_it_was_killed(here, monkeypatch):
    whole,cut = (load_config('x.conf', [*DENSE, f'expname={name}', 'seg_save_ckpt_freq=1']) for name in ('whole','killed'))
    pretrain_decoder(whole)
    def dies(self, *args, before=HiddenTask.loss):
        if args[2]==2: raise KeyboardInterrupt
        return before(self, *args)
    with monkeypatch.context() as m:
        m.setattr(HiddenTask, 'loss', dies)
        with pytest.raises(KeyboardInterrupt): pretrain_decoder(cut)
    pretrain_decoder(cut)
    assert same(*(read_weights(c.folder/'segment'/'decoder') for c in (whole, cut)))

def test_a_painters_decoder_paints(here):
    cfg = load_config('x.conf', ['mae=1', 'pt_norm_pix=1', 'expname=painter', 'seg_decoder_epochs=1', 'seg_decoder_batch_size=4', 'seg_stem=8', 'seg_methods=pretrained'])
    command('pretrain', 'x.conf', ['mae=1', 'pt_norm_pix=1', 'expname=painter', 'seg_stem=8'])
    found = pretrain_decoder(cfg)
    assert found['val_loss']>0 and read_weights(cfg.folder/'segment'/'decoder')['answer.2.weight'].shape==(8*8*3,16)
    assert segment(cfg)[0]['method']=='pretrained'

def test_the_decoder_cannot_peek(here):
    torch.manual_seed(0)
    model = MaskedSegmenter(build_segmenter(load_config('x.conf', ['seg_stem=8'])), 32).eval()
    frames,mask = torch.rand(2,3,64,96),torch.rand(2,96)<.5
    behind = from_patches(mask[...,None].expand(-1,-1,192), (64,96))
    with torch.no_grad(): told = [model(x, mask) for x in (frames, torch.where(behind, torch.rand_like(frames), frames), torch.where(behind, frames, torch.rand_like(frames)))]
    assert torch.equal(told[0], told[1]) and not torch.allclose(told[0], told[2], atol=1e-4)
    assert not model.segmenter.encoder.patch_embed._forward_hooks

def test_what_the_decoders_pretraining_refuses(here):
    for words in (['seg_decoder_epochs=-1'], ['seg_decoder_epochs=1', 'seg_H=32'], ['seg_decoder_epochs=1', 'seg_original=1']):
        with pytest.raises(ValueError, match='seg_decoder_epochs'): load_config('x.conf', words)
    with pytest.raises(ValueError, match='seg_decoder_lr = 0.0 should be above 0'): load_config('x.conf', ['seg_decoder_lr=0'])
    with pytest.raises(FileNotFoundError, match='mem_nb pretrain'): pretrain_decoder(load_config('x.conf', ['expname=none', 'seg_decoder_epochs=1', *DENSE[2:4]]))
    cfg = load_config('x.conf', [*DENSE, 'expname=dense_refused'])
    pretrain_decoder(cfg)
    with pytest.raises(ValueError, match='misshapen.*Remove its folder'): load_decoder(build_segmenter(replace(cfg, segment=replace(cfg.segment, width=8))), decoder_path(cfg))
    with pytest.raises(ValueError, match='seg_decoder_lr was 0.001, is now 0.002'): pretrain_decoder(replace(cfg, segment=replace(cfg.segment, decoder_lr=2e-3)))

def test_what_scratch_is_does_not_ask_how_decoders_were_pretrained(here):
    words = ['expname=only_scratch', 'seg_methods=scratch']
    records = segment(load_config('x.conf', words))
    assert segment(load_config('x.conf', [*words, 'seg_decoder_epochs=3']))==records

def test_status_counts_the_decoder_too(here):
    from mem_nb.pipeline import _asked
    cfg = load_config('x.conf', [*DENSE, 'expname=counted', 'seg_steps=2', 'seg_warmup_steps=1'])
    pretrain_decoder(cfg); save_config(cfg, cfg.folder/'run.conf')
    steps,many = _asked(cfg.folder)
    assert many['segment']==3 and not finished(cfg.folder, 'segment', many)
    segment(cfg)
    assert finished(cfg.folder, 'segment', many)

def test_moments_of_another_layout_are_laid_out_anew(here, tmp_path):
    "Fused optimisers walk through memory as it lies; a state may have been saved before weights were channels last."
    def state(layout):
        torch.manual_seed(0)
        model = build_segmenter(load_config('x.conf')).to(memory_format=layout)
        return TrainingState(model, segmenter_optimizer(model, 1e-3))
    def step(s):
        torch.manual_seed(1)
        s.model.forward_both(torch.rand(2,3,64,96))[0].square().mean().backward()
        s.optimizer.step(); s.optimizer.zero_grad()
    old = state(torch.contiguous_format); step(old); old.step = 1; old.save(tmp_path/'state.pt', {})
    new = state(torch.channels_last); new.load(tmp_path/'state.pt', {})
    before = {k:v.clone() for k,v in old.model.named_parameters()}
    step(old); step(new)
    convolutions = [k for k,v in before.items() if v.ndim==4 and v.shape[2]>1 and not k.startswith('aux.')]
    assert convolutions
    for k in convolutions: assert (new.model.get_parameter(k)-old.model.get_parameter(k)).abs().max() < .2*(old.model.get_parameter(k)-before[k]).abs().max(), k

def test_what_decides_a_decoder_and_what_does_not(here):
    cfg = load_config('x.conf', [*DENSE, 'expname=decides'])
    found = pretrain_decoder(cfg)
    elsewhere = shutil.copytree('runs/run/pretrain', 'elsewhere', dirs_exist_ok=True)
    for words in (['seg_aux_width=4', 'seg_lr=1', 'seg_labels=4'], [f'pt_checkpoint={elsewhere}/final.safetensors']):    # heads, labels, another place
        assert pretrain_decoder(load_config('x.conf', [*DENSE, 'expname=decides', *words]))==found
    narrow = load_config('x.conf', [*DENSE, 'expname=narrow_aux', 'seg_aux_width=4'])
    pretrain_decoder(narrow)
    assert same(*(read_weights(decoder_path(c)) for c in (cfg, narrow)))
    command('tokenizer', 'x.conf', ['expname=other_tokens', 'seed=5'])
    with pytest.raises(ValueError, match='tokenizer_hash'):
        pretrain_decoder(load_config('x.conf', [*DENSE, 'expname=decides', 'vae_checkpoint=runs/other_tokens/tokenizer/final.safetensors']))

def test_a_bad_decoder_is_refused_at_the_door(here):
    with pytest.raises(ValueError, match='seg_norm = batch needs 2 windows'): check_segment(load_config('x.conf', ['seg_decoder_epochs=1', 'seg_decoder_batch_size=1']))
    with pytest.raises(FileNotFoundError, match='nowhere'): check_segment(load_config('x.conf', ['seg_decoder_epochs=1', 'vae_skip=1', 'vae_checkpoint=nowhere']))
    records = segment(cfg := load_config('x.conf', ['seg_methods=pretrained']))
    assert segment(replace(cfg, segment=replace(cfg.segment, decoder_lr=5e-4)))==records      # what is not used decides nothing
