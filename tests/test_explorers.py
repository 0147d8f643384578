"What the explorers do at the edges: one frame, steps that begin later, and what is no recording at all; without a browser."
import json
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from conftest import TINY
from mem_nb import widgets as w
from mem_nb.config import parse_config, save_config
from mem_nb.events import make_events
from mem_nb.finetune import finetune
from mem_nb.panel import Pick, Said, Slide
from mem_nb.pretrain import pretrain
from mem_nb.stills import likeness, png_of
from mem_nb.tokenizer import tokenizer

CONFIGS = Path(__file__).parents[1]/'configs'

@pytest.fixture
def events():
    r,n = np.random.default_rng(0),4000
    return make_events(r.integers(0, 34, n), r.integers(0, 34, n), np.sort(r.integers(0, 300_000, n)), r.integers(0, 2, n))

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run that was trained for seconds."
    root = tmp_path_factory.mktemp('explorers')
    cfg = parse_config(TINY, [f'runs_dir={root}/runs', f'data_path={root}/digits', 'expweek=', 'expname=small'])
    tokenizer(cfg); pretrain(cfg); finetune(cfg); save_config(cfg, cfg.folder/'run.conf')
    return cfg.folder

def other_values(control):
    "Both ends and the middle of a slider; every word; yes and no."
    if isinstance(control, Slide): return {control.fit(min(control.high, control.low+round(k/2*(control.high-control.low)/control.step)*control.step)) for k in range(3)}
    return control.options if isinstance(control, Pick) else (True,False)

def test_a_layout_that_is_kept_is_the_one_that_would_be_found(events, run):
    "Whatever control moves, the picture is the same, byte for byte."
    labels = np.arange(32)[:,None]//8%4 + np.zeros((3,32,32), int)
    panels = [w.explore_recording(events, (34,34)), w.explore_frames(events, (34,34)), w.explore_masks(events, (34,34)), w.watch_training(run), w.explore_codebook(run), w.explore_attention(run),
              w.explore_reconstruction(run), w.browse_evaluation(run), w.step_segmentation(torch.rand(3,3,32,32), labels, labels[:,::-1], ['a','bb','ccc','dddd'])]
    for panel in panels:
        kept = {}
        for name,c in panel.controls.items():
            for v in other_values(c):
                try: pictures = [png_of(panel.figure(**{name:v}), known=where) for where in (kept,None)]
                except ValueError: continue                  # refused, with a sentence
                assert pictures[0]==pictures[1], (panel.controls, name, v)
        assert 0<len(kept)<=64
    assert not plt.get_fignums()

def test_figures_that_need_other_room_are_not_alike():
    def drawn(scale=1., title='one line', size=10, words=None):
        fig,ax = plt.subplots(layout='constrained')
        ax.plot([0,scale]); ax.set_title(title); ax.tick_params(labelsize=size)
        if words: ax.set_yticks(range(len(words)), words)
        try: return likeness(fig)
        finally: plt.close(fig)
    kinds = [drawn(), drawn(1000.), drawn(-1000.), drawn(9e6), drawn(title='two\nlines'), drawn(title=''), drawn(size=20), drawn(words=['a','b']), drawn(words=['a','a long word'])]
    assert len(set(kinds))==len(kinds) and drawn(title='others')==drawn()

def test_one_frame_has_one_place(events):
    masks = w.explore_masks(events, (34,34))
    steps = w.step_segmentation(torch.rand(1,3,32,32), np.zeros((1,32,32), int))
    for panel,name in ((masks,'sample'), (steps,'index')):
        c = panel.controls[name]
        assert (c.low,c.high)==(0,0)
        png,_,told = panel.picture(**{name:0})
        assert png and not told
        with pytest.raises(ValueError, match='0…0'): panel.figure(**{name:1})

def test_steps_come_in_their_order(tmp_path):
    for step in ('segment/scratch_all_seed0','pretrain','finetune/scratch_50_seed0','tokenizer'):
        (tmp_path/step).mkdir(parents=True)
        (tmp_path/step/'log.jsonl').write_text('{"step": 1, "loss": 2.0}\n')
    assert w.watch_training(tmp_path).controls['step'].options==('tokenizer','pretrain','finetune/scratch_50_seed0','segment/scratch_all_seed0')

def test_the_monitor_finds_steps_that_begin_later(tmp_path):
    def log(step, loss):
        (tmp_path/step).mkdir(exist_ok=True)
        (tmp_path/step/'log.jsonl').write_text(''.join(json.dumps(dict(step=k, loss=loss)) + '\n' for k in range(1, 4)))
    log('tokenizer', 2.)
    panel = w.watch_training(tmp_path)
    assert panel.controls['step'].options==('tokenizer',) and panel.values['step']=='tokenizer'
    widget = panel._repr_mimebundle_() and panel.widget
    log('pretrain', 3.)
    widget.draw()                                                # as `follow` does
    offered = dict(zip(panel.controls, widget.holders))['step']
    assert offered.options==('tokenizer','pretrain') and offered.value=='tokenizer'
    assert panel.set(step='pretrain').figure().axes[0].get_title()=='pretrain: loss'
    assert offered.value=='pretrain'
    with pytest.raises(ValueError, match='finetune'): panel.set(step='finetune')

def test_the_monitor_follows_a_log_that_was_taken_back(tmp_path):
    (tmp_path/'pretrain').mkdir()
    log = tmp_path/'pretrain'/'log.jsonl'
    write = lambda losses, more='': log.write_text(''.join(json.dumps(dict(step=k, loss=v)) + '\n' for k,v in enumerate(losses, 1)) + more)
    write([2.,2.5,2.25,2.75])
    panel = w.watch_training(tmp_path)
    shown = lambda: panel.figure(quantity='loss').axes[0].lines[-1].get_ydata().tolist()
    assert shown()==[2.,2.5,2.25,2.75]
    write([2.,2.5,3.25,3.75,3.5,3.])                         # killed after step 4, continued from step 2, and longer than before at the next look
    assert shown()==[2.,2.5,3.25,3.75,3.5,3.]
    write([2.,2.5])                                          # shorter
    assert shown()==[2.,2.5]
    write([2.,2.5], '{"step": 3, "lo')                       # a line half written
    assert shown()==[2.,2.5]
    log.unlink()
    assert shown()==[2.,2.5]                                 # gone; what was seen stays

def test_the_monitor_offers_numbers_that_come_later(tmp_path):
    (tmp_path/'finetune'/'scratch_50_seed0').mkdir(parents=True)
    log = tmp_path/'finetune'/'scratch_50_seed0'/'log.jsonl'
    log.write_text('{"step": 1, "loss": 2.0, "note": "no number"}\n')
    panel = w.watch_training(tmp_path)
    panel.picture()
    assert panel.controls['quantity'].options==('loss',)
    with open(log, 'a') as f: f.write('{"step": 2, "loss": 1.0, "val_accuracy": 0.5}\n{"step": 3, "loss": 1.0}\n')
    panel.picture()
    assert panel.controls['quantity'].options==('loss','val_accuracy') and panel.set(quantity='val_accuracy').picture()[0]

def test_a_number_of_another_step_is_said_to_be_absent(tmp_path):
    for step,more in (('tokenizer','"kl": 1.0'), ('pretrain','"lr": 0.1')):
        (tmp_path/step).mkdir()
        (tmp_path/step/'log.jsonl').write_text(f'{{"step": 1, "loss": 2.0, {more}}}\n')
    fig = w.watch_training(tmp_path).figure(step='pretrain', quantity='kl')
    assert [t.get_text() for t in fig.axes[0].texts]==['kl was not logged in this step']

def test_a_refused_picture_leaves_no_figure(tmp_path):
    (tmp_path/'pretrain').mkdir(); (tmp_path/'tokenizer').mkdir()
    (tmp_path/'pretrain'/'log.jsonl').write_text('{"step": 1, "loss": 2.0}\n'); (tmp_path/'tokenizer'/'log.jsonl').write_text('')
    panel,before = w.watch_training(tmp_path),plt.get_fignums()
    png,_,told = panel.picture(step='tokenizer')
    assert not png and 'tokenizer' in told and plt.get_fignums()==before

def test_play_goes_on_from_where_the_slider_is(events):
    panel = w.explore_recording(events, (34,34))
    panel._repr_mimebundle_()
    row = next(b for b in panel.widget.box.children[0].children if len(getattr(b, 'children', ()))==2)
    play,slider = row.children
    slider.value = .8
    assert play.value==80
    play.value += 1
    assert slider.value==pytest.approx(.81) and panel.values['position']==pytest.approx(.81)
    panel.set(position=.2)
    assert play.value==20

@pytest.mark.parametrize('wrong', [None, 5, ['runs/demo']])
def test_no_run_folder_is_told_in_a_sentence(wrong):
    for explore in (w.explore_reconstruction, w.explore_codebook, w.explore_attention, w.watch_training, w.browse_evaluation):
        said = explore(wrong)
        assert isinstance(said, Said) and 'folder of a run' in said.text and isinstance(said.error, ValueError)

def test_arrays_that_are_no_events_are_told(events):
    for a,size,word in ((np.zeros(5), None, 'fields x, y, t and p'), (events[::-1].copy(), None, 'backwards'), (events, (8,8), 'sensor size'), (events, 34, '(H, W)'), (events, ('a',2), '(H, W)')):
        for explore in (w.explore_recording, w.explore_frames, w.explore_masks): assert word in explore(a, size).text
    assert '(B, C, H, W)' in w.explore_masks(torch.rand(3,32,32)).text and w.explore_masks(torch.rand(1,3,32,32, requires_grad=True)).picture()[0]
    assert w.step_segmentation(torch.rand(1,3,32,32, requires_grad=True), np.zeros((1,32,32), int)).picture()[0]
    assert isinstance(w.step_segmentation(None, None), Said) and isinstance(w.explore_recording(), Said)

def test_the_evaluation_shows_the_accuracy_and_the_probabilities_of_the_classifier(run):
    from mem_nb.finetune import load_classifier, predict
    from mem_nb.model_widgets import run_config
    from mem_nb.store import EventStore
    from mem_nb.datasets import prepared
    cfg = run_config(run)
    panel = w.browse_evaluation(run)
    name = panel.values['classifier']
    method,_,rest = name.partition('_'); labels,_,seed = rest.rpartition('_seed')
    p = predict(load_classifier(cfg, 10, method, labels, int(seed)), EventStore(prepared(cfg), 'val'), cfg.data)
    fig = panel.figure()
    accuracy = json.loads((run/'finetune'/name/'final.json').read_text())['metrics']['val_accuracy']
    assert f'{100*accuracy:.1f} % right' in fig.axes[0].get_title()
    shown = [a.get_title() for a in fig.axes[1:] if a.get_title().endswith('%')]
    said = p[:,panel.values['said_class']]
    assert shown and all(any(f'{100*v:.0f} %'==t for v in said.tolist()) for t in shown)
    assert float(shown[0].split()[0])>=100*float(p.max(1).values.min())-1

def test_a_copy_among_the_finetunings_is_none(run, tmp_path):
    from shutil import copytree
    from mem_nb.model_widgets import run_config
    from mem_nb.run_widgets import finetuned
    copytree(run, other := tmp_path/'small')
    before = finetuned(run_config(other))
    first = other/'finetune'/next(iter(before))
    copytree(first, other/'finetune'/'backup'); copytree(first, other/'finetune'/'scratch_40_seed_old')
    (first/'final.json').unlink()
    assert set(finetuned(run_config(other)))==set(before)-{first.name}

@pytest.mark.parametrize('wrong', [5, None, '/nonexistent.bin'])
def test_no_recording_is_told_in_a_sentence(wrong):
    for explore in (w.explore_recording, w.explore_frames, w.explore_masks):
        said = explore(wrong)
        assert isinstance(said, Said) and str(wrong) in said.text
        assert said.set(position=.5) is said and said.picture()[0]

def test_label_maps_that_are_none_are_told():
    assert '(T, C, H, W)' in w.step_segmentation([1], [[1]]).text
    frames,maps = torch.rand(2,3,8,8),np.zeros((2,8,8), int)
    for wrong,word in ((maps+.5, 'whole numbers'), (maps-1, '0…255'), (maps+300, '0…255'), (maps+5, 'no name')): assert word in w.step_segmentation(frames, wrong, classes=['a','b']).text
    maps[:,:2] = 255                                             # left out, in predictions too
    fig = w.step_segmentation(frames, maps).figure()
    assert [t.get_text() for t in fig.legends[0].get_texts()]==['0']

def test_stacked_counts_keep_their_colors():
    from mem_nb.viz import frame_to_rgb, two_colors
    f = np.zeros((6,4,4), np.float32)
    f[1,0,0] = f[5,3,3] = f[4,3,3] = 1                           # brighter in the second slice; darker in the second and third
    rgb = frame_to_rgb(two_colors(f, 'stacked'), vmax=2)
    assert rgb[0,0,0]>rgb[0,0,2] and rgb[3,3,2]>rgb[3,3,0] and torch.equal(torch.tensor(two_colors(f[None], 'stacked')[0]), two_colors(torch.tensor(f), 'stacked'))
    assert two_colors(f, 'voxel') is f

def test_weights_along_the_way_are_offered_and_newer_ones_are_taken(run, tmp_path):
    from shutil import copytree
    from safetensors.torch import load_file, save_file
    copytree(run, other := tmp_path/'small')
    final = other/'pretrain'/'final.safetensors'
    (other/'pretrain'/'steps').mkdir(exist_ok=True)
    weights = load_file(final)
    save_file({k:torch.zeros_like(v) for k,v in weights.items()}, other/'pretrain'/'steps'/'0000012.safetensors')
    panel = w.explore_reconstruction(other)
    assert panel.controls['weights'].options==('final','step 12') and panel.values['weights']=='final'
    trained,untrained = (panel.picture(weights=k)[0] for k in ('final','step 12'))
    assert trained and untrained and trained!=untrained
    save_file({k:torch.zeros_like(v) for k,v in weights.items()}, final)
    assert panel.picture()[0] not in (trained,b'')               # not what was read before
    panel._repr_mimebundle_()
    offered = dict(zip(panel.controls, panel.widget.holders))['weights']
    final.unlink()
    panel.widget.draw()
    assert not panel.widget.picture.png and 'choose others' in panel.widget.told.value and offered.options==('step 12',) and offered.value is None
    offered.value = 'step 12'
    assert panel.widget.picture.png and panel.values['weights']=='step 12'

def test_two_views_alone_ask_nothing_about_hidden_patches(run, tmp_path):
    from shutil import copytree
    copytree(run, other := tmp_path/'small')
    text = (other/'run.conf').read_text().replace('pt_hidden = 1.0', 'pt_hidden = 0').replace('pt_contrast = 0.0', 'pt_contrast = 1')
    (other/'run.conf').write_text(text)
    assert 'two views' in w.explore_reconstruction(other).text

def test_a_folder_is_no_recording(tmp_path): assert 'is a folder' in w.explore_recording(tmp_path).text

def test_an_explorer_prepares_nothing_for_a_run_without_a_tokenizer(tmp_path):
    run = tmp_path/'run'
    (run/'pretrain').mkdir(parents=True); (run/'pretrain'/'final.safetensors').write_bytes(b'broken')
    (run/'run.conf').write_text((CONFIGS/'demo.conf').read_text() + f'\ndata_path = {tmp_path}/digits\n' if 'data_path' not in (CONFIGS/'demo.conf').read_text()
                                else '\n'.join(f'data_path = {tmp_path}/digits' if l.startswith('data_path') else l for l in (CONFIGS/'demo.conf').read_text().splitlines()))
    said = w.explore_reconstruction(run)
    assert isinstance(said, Said) and 'tokenizer' in said.text and not (tmp_path/'digits').exists()

def test_frames_of_every_representation_bend(events):
    panel = w.explore_frames(events, (34,34))
    seen = {panel.picture(representation=r, augmentation='bend', strength=s)[0] for r in panel.controls['representation'].options for s in (.2,.8)}
    assert len(seen)==8 and b'' not in seen
