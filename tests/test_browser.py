"""JupyterLab in a real browser: each explorer is moved and clicked, notebooks run. The pictures are kept in _proc/browser.

A tenth of the notebooks runs each day; all of them: MEM_NB_BROWSER=all python -m pytest tests/test_browser.py"""
import json, os
from datetime import date
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
import nbformat, numpy as np, pytest, torch
from conftest import TINY
from lab import ERRORS, ROOT, Notebook, absent, chromium, copy_notebook, lab

pytestmark = pytest.mark.skipif(bool(absent()), reason=absent() or 'a browser')
SHOTS = ROOT/'_proc'/'browser'
SHARES = 10

EXPLORERS = dict(   # name -> what makes it; in a state in which each control has something to change
    recording="explore_recording(paths[0], (34,34)).set(position=.4, length=-1)",
    frames="explore_frames(broken, (34,34)).set(augmentation='shift', strength=.3, gamma=.6)",
    masks="explore_masks(frames).set(share=.3)",
    reconstruction="explore_reconstruction(run)",
    codebook="explore_codebook(run, page=16)",
    attention="explore_attention(run)",
    monitor="watch_training(run, 'runs/other', follow=200).set(step='pretrain')",
    evaluation="browse_evaluation(run)",
    segmentation="step_segmentation(series, np.roll(truth, 5, axis=2), truth, ['nothing','brighter','darker'])",
)
LOOKS = {('monitor','look')}             # looks at the files again, which have not changed: another test lets them grow
HEAD = """
from pathlib import Path
import numpy as np, torch
from mem_nb.batches import batch_events
from mem_nb.events import make_events
from mem_nb.formats import read_events
from mem_nb.frames import to_frames
from mem_nb.event_widgets import explore_frames, explore_masks, explore_recording
from mem_nb.model_widgets import explore_attention, explore_codebook, explore_reconstruction
from mem_nb.run_widgets import browse_evaluation, step_segmentation, watch_training
run,paths = Path('runs/small'),sorted(Path('digits').rglob('*.bin'))[:4]
some = [read_events(p, size=(34,34)) for p in paths]
e,n = some[0],400                                  # and a pixel that is broken
hot = make_events(np.full(n, 3), np.full(n, 3), np.linspace(e['t'][0], e['t'][-1], n).astype(int), np.ones(n, bool))
broken = np.sort(np.concatenate([e, hot]), order='t', kind='stable')
frames = to_frames(batch_events(some, (34,34)), (224,224), gain=2.)
series = torch.cat([frames, frames.flip(3)])
up,down = series.numpy()[:,[0,-1]].swapaxes(0,1)
truth = np.where(up>down, 1, np.where(down>up, 2, 0))
"""

def log_line(k): return json.dumps(dict(step=3*k, steps=60, loss=3+2/k, lr=1e-3/k, images_s=500+9*k, step_seconds=.1)) + '\n'

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "The folder that JupyterLab serves."
    root = tmp_path_factory.mktemp('lab')
    for folder in ('configs','tests','benchmarks'): (root/folder).symlink_to(ROOT/folder)
    return root

@pytest.fixture(scope='module')
def written(root):
    "In it, a run that was trained for seconds, and a notebook with one explorer a cell."
    for module in ('event_widgets','model_widgets','run_widgets'): pytest.importorskip(f'mem_nb.{module}')
    from mem_nb.config import parse_config, save_config
    from mem_nb.finetune import finetune
    from mem_nb.pretrain import build_model, pretrain
    from mem_nb.tokenizer import tokenizer
    cfg = parse_config(TINY, [f'runs_dir={root}/runs', f'data_path={root}/digits', 'expweek=', 'expname=small'])
    tokenizer(cfg); pretrain(cfg); finetune(cfg); save_config(cfg, cfg.folder/'run.conf')
    (last := cfg.folder/'pretrain'/'last').mkdir(exist_ok=True)
    torch.save(dict(model=build_model(cfg).state_dict()), last/'state.pt')          # untrained, as an earlier state would be
    (other := root/'runs'/'other'/'pretrain').mkdir(parents=True)
    (other/'log.jsonl').write_text(''.join(map(log_line, range(1, 8))))
    cells = [nbformat.v4.new_code_cell(text) for text in (HEAD, *EXPLORERS.values())]
    kernel = dict(name='python3', display_name='python3', language='python')
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), root/'explorers.ipynb')

@pytest.fixture(scope='module')
def jupyter(root):
    with lab(root) as url: yield url

@pytest.fixture(scope='module')
def open_page():
    SHOTS.mkdir(parents=True, exist_ok=True)
    with chromium() as open_page: yield open_page

@pytest.fixture(scope='module')
def page(open_page): return open_page()

@pytest.fixture(scope='module')
def explorers(open_page, written, jupyter):
    page = open_page()
    nb = Notebook(page, jupyter, 'explorers.ipynb')
    errors = nb.run()
    assert not errors, errors[0]
    page.wait_for_function(f"document.querySelectorAll('img.mem-nb-picture').length === {len(EXPLORERS)}")
    yield dict(zip(EXPLORERS, nb.explorers()))
    nb.close()

@pytest.mark.parametrize('name', EXPLORERS)
def test_every_control_changes_the_picture_and_back(explorers, name):
    "A move changes the picture; the way back gives the first one: nothing stale, nothing drawn by chance."
    e = explorers[name]
    assert e.picture(), e.told()
    e.shot(SHOTS/f'{name}.png')
    unmoved = []
    for control in e.controls():
        if (name,control.name) in LOOKS: continue
        start,first = control.value(),e.picture()
        moves = control.moves()
        assert moves, f'{control.name} has one position only'
        for word,move in moves:
            now = e.after(move)
            assert now, f'{control.name} {word}: {e.told() if now=="" else "no answer"}'
            if now!=first: break
        else: unmoved.append(control.name); continue
        e.shot(SHOTS/f'{name}-{control.name}.png')
        control.put(start)
        assert e.becomes(first), f'{control.name}: another picture at {start} than before'
    assert not unmoved, f'{name}: {", ".join(unmoved)} changed nothing'

@pytest.mark.parametrize('name, control', [('reconstruction','patch_number'), ('attention','patch_number'), ('codebook','rank')])
def test_a_click_on_the_picture_chooses_what_lies_there(explorers, name, control):
    "Clicks all over the picture: some hit, and choose different things; one in the corner hits nothing."
    e = explorers[name]
    first,chosen = e.picture(),set()
    for where in ((u,v) for v in (.3,.55) for u in (.06,.12,.18)):
        if e.after(lambda: e.click(*where), 5): chosen.add((e.control(control).value(), e.picture()))
    assert len(chosen)>2 and len({p for _,p in chosen})==len(chosen) and {p for _,p in chosen}!={first}
    e.shot(SHOTS/f'{name}-click.png')
    e.settled(quiet=1)
    assert e.after(lambda: e.click(.997, .997), 2) is None

def test_a_click_on_a_cell_of_the_confusion_matrix_opens_its_recordings(explorers, root):
    "A cell that holds recordings shows them, one that holds none shows none; the controls say which cell it is."
    import torch
    from mem_nb.run_widgets import browse_evaluation, finetuned
    from mem_nb.config import load_config
    from mem_nb.datasets import prepared
    from mem_nb.finetune import load_classifier, predict
    from mem_nb.store import EventStore
    e,cfg = explorers['evaluation'],load_config(root/'runs/small/run.conf')
    val,word = EventStore(prepared(cfg), 'val'),e.control('classifier').value()
    said = torch.as_tensor(predict(load_classifier(cfg, len(val.classes), *finetuned(cfg)[word]), val, cfg.data)).argmax(1).numpy()
    counts = np.zeros((len(val.classes),)*2, int); np.add.at(counts, (val.labels, said), 1)
    where = {p[0]:p for p in browse_evaluation(root/'runs/small').picture()[1]}['confusion']
    at = lambda: tuple(e.control(c).value() for c in ('true_class','said_class'))
    def ink():      # coloured pixels of the right half, where the recordings are; its title is black, its ground white
        rgb = e.pixels()[:,int(.5*e.pixels().shape[1]):].astype(int)
        return int((rgb.max(2)-rgb.min(2)>60).sum())
    full,empty = ([tuple(c) for c in np.argwhere(found)] for found in (counts>0, counts==0))
    seen = set()
    for cell in (full[-1], empty[-1], full[1]):
        e.after(lambda: e.click(*share_of(where, cell[1], cell[0])))
        assert at()==cell, f'a click on {cell} chose {at()}'
        assert (ink()>50)==bool(counts[cell]), f'{counts[cell]} recordings in {cell}, {ink()} coloured pixels'
        seen.add(e.picture())
        e.shot(SHOTS/f'evaluation-cell-{cell[0]}-{cell[1]}.png')
    assert len(seen)==3

def share_of(place, x, y):
    "The share of a picture's width and height at which a point of its axes lies."
    _,left,bottom,width,height,(x0,x1),(y0,y1) = place
    return left+width*(x-x0)/(x1-x0), 1-(bottom+height*(y-y0)/(y1-y0))

def test_the_monitor_follows_a_log_that_grows(explorers, root):
    "While it follows, each line that a run writes comes into the picture; a look at the same files changes nothing."
    e,button = explorers['monitor'],explorers['monitor'].cell.locator('.widget-play button').first
    before = e.picture()
    button.click()
    e.page.wait_for_timeout(1000)
    assert e.picture()==before and e.control('look').value()>0
    for k in range(8, 11):
        with open(root/'runs'/'other'/'pretrain'/'log.jsonl', 'a') as f: f.write(log_line(k))
        assert e._until(lambda: e.picture() not in ('',before), 20), f'line {k} was not seen'
        before = e.picture()
        e.shot(SHOTS/f'monitor-line-{k}.png')
    button.click()
    e.settled(quiet=2)

@pytest.mark.parametrize('name, control', [('recording','position'), ('masks','seed'), ('segmentation','index')])
def test_play_goes_on_until_it_is_paused(explorers, name, control):
    e = explorers[name]
    seen,values = set(),set()
    button = e.cell.locator('.widget-play button').first
    button.click()
    for _ in range(400):
        seen.add(e.picture()); values.add(e.control(control).value())
        if len(seen)>3 and len(values)>1: break        # the slider may be told a little after the picture
        e.page.wait_for_timeout(50)
    button.click()
    assert len(seen)>3 and len(values)>1             # the last value may be the first again: playing goes round
    e.settled(quiet=2)

def test_a_picture_that_cannot_be_drawn_leaves_a_sentence_and_no_old_picture(explorers):
    e = explorers['frames']
    kind,kept = e.control('augmentation'),e.control('representation')
    a,b = kind.value(),kept.value()
    e.after(lambda: kind.put('Equalize'))
    e.after(lambda: kept.put('voxel grid'))
    assert not e.picture() and 'three channels' in e.told() and 'Traceback' not in e.told()
    e.shot(SHOTS/'frames-refused.png')
    e.after(lambda: kept.put(b))
    assert e.picture() and 'three channels' not in e.told()
    e.after(lambda: kind.put(a))

def test_no_cell_holds_an_error_and_nothing_was_asked_of_another_machine(explorers):
    page = explorers['frames'].page
    assert page.evaluate(ERRORS)==[] and page.left==[]

def notebooks():
    "Those whose turn it is; with widgets first, which are always run."
    found = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    if os.environ.get('MEM_NB_BROWSER')=='all': return found
    turn = date.today().toordinal()%SHARES
    return [n for i,n in enumerate(found) if i%SHARES==turn or 'widgets' in n or 'panel' in n]

@pytest.mark.parametrize('name', notebooks())
def test_a_notebook_runs_in_jupyterlab(page, jupyter, root, name):
    from nbdev.config import get_config
    copy_notebook(ROOT/name, root/name, set(get_config().tst_flags.split()))
    nb = Notebook(page, jupyter, name)
    try:
        errors = nb.run(seconds=600)
        assert not errors, errors[0]
        page.screenshot(path=SHOTS/f'{Path(name).stem}.png')
    finally: nb.close()

SITE = ROOT/'_docs'

@pytest.fixture
def site():
    "The address of the documentation, served from this machine."
    if not (SITE/'index.html').is_file(): pytest.skip('no documentation in _docs/; make docs builds it')
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(SITE)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()

def test_the_documentation_is_clicked_through(open_page, site):
    "Each part that the front page names opens; the search finds the tokenizer; nothing is loaded from elsewhere."
    page,wrong = open_page(),[]
    page.on('pageerror', lambda e: wrong.append(str(e)))
    page.goto(site)
    page.screenshot(path=SHOTS/'docs.png')
    parts = page.locator('.sidebar-tree > ul > li > a.reference')
    assert parts.count()>4
    for i in range(parts.count()):
        page.goto(site)
        with page.expect_navigation(): parts.nth(i).click()
        assert page.locator('article h1').count(), f'{page.url} has no title'
    page.locator('.sidebar-search').first.fill('tokenizer'); page.locator('.sidebar-search').first.press('Enter')
    page.wait_for_selector('#search-results li a')
    page.screenshot(path=SHOTS/'docs-search.png')
    with page.expect_navigation(): page.locator('#search-results li a').first.click()
    assert 'okenizer' in page.locator('article').inner_text()
    assert page.left==[] and wrong==[]
