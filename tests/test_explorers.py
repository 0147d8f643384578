"What the explorers do at the edges: one frame, steps that begin later, and what is no recording at all; without a browser."
import json
from pathlib import Path
import numpy as np, pytest, torch
from mem_nb import widgets as w
from mem_nb.events import make_events
from mem_nb.panel import Said

CONFIGS = Path(__file__).parents[1]/'configs'

@pytest.fixture
def events():
    r,n = np.random.default_rng(0),4000
    return make_events(r.integers(0, 34, n), r.integers(0, 34, n), np.sort(r.integers(0, 300_000, n)), r.integers(0, 2, n))

def test_one_frame_has_one_place(events):
    masks = w.explore_masks(events, (34,34))
    steps = w.step_segmentation(torch.rand(1,3,32,32), np.zeros((1,32,32), int))
    for panel,name in ((masks,'sample'), (steps,'index')):
        c = panel.controls[name]
        assert (c.low,c.high)==(0,0)
        png,_,told = panel.picture(**{name:0})
        assert png and not told
        with pytest.raises(ValueError, match='0…0'): panel.figure(**{name:1})

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

@pytest.mark.parametrize('wrong', [5, None, '/nonexistent.bin'])
def test_no_recording_is_told_in_a_sentence(wrong):
    for explore in (w.explore_recording, w.explore_frames, w.explore_masks):
        said = explore(wrong)
        assert isinstance(said, Said) and str(wrong) in said.text
        assert said.set(position=.5) is said and said.picture()[0]

def test_label_maps_that_are_none_are_told():
    assert '(T, C, H, W)' in w.step_segmentation([1], [[1]]).text

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
