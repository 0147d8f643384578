"How long an explorer takes to answer a control: OMP_NUM_THREADS=2 python benchmarks/widgets.py"
import sys, tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
import numpy as np
from fastcore.script import call_parse, store_true
from common import machine, record, table, write

sys.path.insert(0, str(Path(__file__).parents[1]/'tests'))

def small_run(root):
    "A run folder, trained for seconds; what an answer costs does not depend on how well it was trained."
    from conftest import TINY
    from mem_nb.config import parse_config, save_config
    from mem_nb.pretrain import pretrain
    from mem_nb.tokenizer import tokenizer
    cfg = parse_config(TINY, [f'runs_dir={root}/runs', f'data_path={root}/digits', 'expweek=', 'expname=small'])
    tokenizer(cfg); pretrain(cfg); save_config(cfg, cfg.folder/'run.conf')
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

def panels(run):
    "The explorers, each in a state in which every control has something to change."
    from mem_nb import event_widgets as e, model_widgets as m
    events = recording(100_000)
    return dict(recording=e.explore_recording(events, (180,240)).set(position=.4),
        frames=e.explore_frames(events, (180,240)).set(augmentation='shift'),
        masks=e.explore_masks(_frames(events)), reconstruction=m.explore_reconstruction(run),
        codebook=m.explore_codebook(run, page=16), attention=m.explore_attention(run))

def _frames(events):
    from mem_nb.batches import batch_events
    from mem_nb.frames import to_frames
    return to_frames(batch_events([events[k*25_000:(k+1)*25_000] for k in range(4)], (180,240)), (224,224), gain=2.)

def values(control, n):
    "Up to `n` values of a control, other than the one it has."
    if hasattr(control, 'options'): found = list(control.options)
    elif hasattr(control, 'low'):
        steps = round((control.high-control.low)/control.step)
        found = [control.fit(min(control.high, control.low+control.step*round(k*steps/n))) for k in range(n+1)]
    else: found = [True, False]
    return list(dict.fromkeys(v for v in found if v!=control.value))[:n]

def answers(panel, name, n):
    "Seconds that each of some moves of a control takes, to the PNG; refused ones (a sentence) are left out."
    took = []
    for v in values(panel.controls[name], n):
        start = perf_counter(); png,_,told = panel.picture(**{name:v}); end = perf_counter()
        if png: took.append(end-start)
    return took

@call_parse
def main(
    run:str='',   # run folder for the explorers of models; without it a small one is trained
    n:int=7,      # moves a control
    json:str='',  # file for the records
):
    "Measure the explorers, control by control"
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for name,panel in panels(run or small_run(root)).items():
            panel.picture()                                   # what the first picture loads is not part of an answer
            for control in panel.controls:
                took = answers(panel, control, n)
                if took: rows.append(record(f'{name}: {control}', 1000*median(took), 'ms', goal=200, better='lower'))
    print(table(rows)); print(machine())
    if json: write(json, rows)
