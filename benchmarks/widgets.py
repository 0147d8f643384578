"How long an explorer takes to answer a control, and the first tutorial to show its first picture: OMP_NUM_THREADS=2 python benchmarks/widgets.py --json benchmarks/widgets.json"
import json, sys, tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
import numpy as np
from fastcore.script import call_parse
from common import machine, record, table, write

sys.path.insert(0, str(Path(__file__).parents[1]/'tests'))

def small_run(root):
    "A run folder, trained for seconds; what an answer costs does not depend on how well it was trained."
    from conftest import TINY
    from mem_nb.config import parse_config, save_config
    from mem_nb.finetune import finetune
    from mem_nb.pretrain import pretrain
    from mem_nb.tokenizer import tokenizer
    cfg = parse_config(TINY, [f'runs_dir={root}/runs', f'data_path={root}/digits', 'expweek=', 'expname=small'])
    tokenizer(cfg); pretrain(cfg); finetune(cfg); save_config(cfg, cfg.folder/'run.conf')
    return cfg.folder

def recording(n, size=(180,240), seconds=1., seed=0):
    "`n` events of a spot that circles before a sensor, among noise."
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, int(seconds*1e6), n))
    noise = rng.random(n)<.1
    turn = 2*np.pi*t/1e6
    x = np.where(noise, rng.random(n)*size[1], size[1]/2+60*np.cos(turn)+rng.normal(0, 6, n)).clip(0, size[1]-1)
    y = np.where(noise, rng.random(n)*size[0], size[0]/2+60*np.sin(turn)+rng.normal(0, 6, n)).clip(0, size[0]-1)
    from mem_nb.events import make_events
    return make_events(x.astype(int), y.astype(int), t, rng.random(n)<.5)

def log_lines(first, n):
    "What a training writes: `n` lines from step `first` on, every fiftieth with a validation."
    for k in range(first, first+n):
        line = dict(step=k, steps=200_000, loss=2+3/(1+k/5000)+.1*np.sin(k), masked_accuracy=.5-.4/(1+k/9000), grad_norm=1., lr=5e-4/(1+k/1e5),
                    images_s=900+30*np.cos(k), seconds=.2*k, step_seconds=.2)
        yield json.dumps(line | (dict(val_loss=line['loss']+.1, val_masked_accuracy=line['masked_accuracy']-.02) if k%50==0 else {})) + '\n'

class Training:
    "A run folder with a long log, that goes on while it is watched."
    def __init__(self, root, lines):
        self.folder,self.lines = Path(root)/'long',0
        self.log = self.folder/'pretrain'/'log.jsonl'
        self.log.parent.mkdir(parents=True)
        (self.folder/'tokenizer').mkdir()
        (self.folder/'tokenizer'/'log.jsonl').write_text(''.join(log_lines(1, 200)))
        self.write(lines)
    def write(self, n=20):
        with open(self.log, 'a') as f: f.writelines(log_lines(self.lines+1, n))
        self.lines += n

def label_maps(n_events, windows=20, size=(440,640), classes=11):
    "Frames of a recording in windows, and label maps as large: stripes that move, predicted a little to the side."
    from mem_nb.batches import batch_events
    from mem_nb.frames import to_frames
    events,n = recording(n_events, size),n_events//windows
    frames = to_frames(batch_events([events[k*n:(k+1)*n] for k in range(windows)], size), size, gain=2.)
    truth = ((np.arange(size[1]) + 8*np.arange(windows)[:,None,None])//60%classes + np.zeros((1,size[0],1), int)).astype(np.uint8)
    predicted = np.roll(truth, 6, axis=2); truth[:,:20] = 255
    return frames, predicted, truth, [f'class {k}' for k in range(classes)]

def panels(run, training, n):
    "The explorers, each in a state in which every control has something to change."
    from mem_nb import event_widgets as e, model_widgets as m, run_widgets as r
    events = recording(n)
    return dict(recording=e.explore_recording(events, (180,240)).set(position=.4),
        frames=e.explore_frames(events, (180,240)).set(augmentation='shift'),
        masks=e.explore_masks(_frames(events)), reconstruction=m.explore_reconstruction(run),
        codebook=m.explore_codebook(run, page=16), attention=m.explore_attention(run),
        monitor=r.watch_training(training.folder).set(step='pretrain', quantity='loss'), evaluation=r.browse_evaluation(run),
        segmentation=r.step_segmentation(*label_maps(n)))

def _frames(events):
    from mem_nb.batches import batch_events
    from mem_nb.frames import to_frames
    n = len(events)//4
    return to_frames(batch_events([events[k*n:(k+1)*n] for k in range(4)], (180,240)), (224,224), gain=2.)

def values(control, n):
    "Up to `n` values of a control, other than the one it has."
    if hasattr(control, 'options'): found = list(control.options)
    elif hasattr(control, 'low'):
        steps = round((control.high-control.low)/control.step)
        found = [control.fit(min(control.high, control.low+control.step*round(k*steps/n))) for k in range(n+1)]
    else: found = [True, False]
    return list(dict.fromkeys(v for v in found if v!=control.value))[:n]

def answers(panel, name, n, before=lambda: None):
    "Seconds that each of some moves of a control takes, to the PNG; refused ones (a sentence) are left out. `before` is done before each."
    took = []
    for v in values(panel.controls[name], n):
        before()
        start = perf_counter(); png,_,told = panel.picture(**{name:v}); end = perf_counter()
        if png: took.append(end-start)
    return took

def first_pictures(n):
    "Seconds from opening the first tutorial in JupyterLab, in a real browser and without a net, to its first picture, all cells run; `n` times."
    from lab import ROOT, RUN, Notebook, absent, chromium, copy_notebook, lab
    if absent(): print(f'no first picture: {absent()}'); return []
    took,name = [],'01_five_minutes.ipynb'
    with tempfile.TemporaryDirectory() as root:
        copy_notebook(ROOT/'nbs'/'tutorials'/name, Path(root)/name, set())     # without outputs
        with lab(Path(root)) as url, chromium() as open_page:
            for _ in range(n):
                page = open_page()
                start = perf_counter()
                notebook = Notebook(page, url, name)                           # open, its kernel ready
                page.evaluate(RUN)
                page.locator('.jp-OutputArea-output img').first.wait_for()
                took.append(perf_counter()-start)
                if page.left: raise SystemExit(f'asked of another machine: {page.left[0]}')
                notebook.close(); page.close()
    return took

GOALS = dict(monitor=500)   # ms; the others 200

@call_parse
def main(
    run:str='',      # run folder for the explorers of models; without it a small one is trained
    n:int=7,         # moves a control
    events:int=100_000, # events of the recording
    lines:int=100_000,  # lines of the log that the monitor follows; it grows by 20 before each move
    opens:int=3,     # times that the first tutorial is opened in a browser; 0: not at all
    json:str='',     # file for the records
):
    "Measure the explorers, control by control, and the longest single answer of each; then the first picture of the first tutorial"
    rows = []
    with tempfile.TemporaryDirectory() as root:
        training = Training(root, lines)
        for name,panel in panels(run or small_run(root), training, events).items():
            if not panel.controls: raise SystemExit(f'{name}: {panel.note}')
            panel.picture()                                   # what the first picture loads is not part of an answer
            every = {c:answers(panel, c, n, training.write if name=='monitor' else lambda: None) for c in panel.controls}
            goal,all_of_it = GOALS.get(name, 200),[t for took in every.values() for t in took]
            if not all_of_it: raise SystemExit(f'{name}: no control gave a picture')
            rows.append(record(f'{name}: all controls, median', 1000*median(all_of_it), 'ms', goal=goal, better='lower'))
            rows.append(record(f'{name}: all controls, longest', 1000*max(all_of_it), 'ms', better='lower'))
            rows += [record(f'{name}: {c}', 1000*median(took), 'ms', goal=goal, better='lower') for c,took in every.items() if took]
    if took := first_pictures(opens):
        rows.append(record(f'first tutorial: from opening to its first picture, longest of {len(took)}', max(took), 's', goal=20, better='lower'))
    print(table(rows)); print(machine())
    if json: write(json, rows)
