"""Kill training with -9 at random moments of every step, again and again, and compare the weights with those of an unbroken run, bit by bit.

python benchmarks/soak.py --kills 100 --json benchmarks/soak.json

A tiny run of all steps (recordings simulated and packed, tokenizer, pretraining, finetuning with averaged weights, segmentation with its own
recordings) is killed as a whole, twice in each step: at a moment drawn from the first half of the time that the step takes, and so long after its
first update (of `prepare`, after its beginning). The same command continues it. When it has ended, every step's weights are compared, and a new run begins with new folders, until so many kills have been made.
The records are written after every run. Attempts are forks of this process, which has imported everything, so that a start is cheap.
"""
import argparse, json, mmap, os, random, signal, tempfile, time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
import torch
from common import machine, record, table, write
from mem_nb.config import parse_config
from mem_nb.pipeline import run_step
from mem_nb.processes import launch
from mem_nb.state import has_state, is_done, sound_state
from mem_nb.train import Trainer
import mem_nb.datasets, mem_nb.finetune, mem_nb.pretrain, mem_nb.segment, mem_nb.tokenizer   # imported once, for all forks

STEPS,EACH = ('prepare','tokenizer','pretrain','finetune','segment'),2    # kills in each step of a run
CONF = """
data_set = digits
num_digits = 240
input_H = 32
input_W = 32
frame_fit = crop
slice_max_evs = 2000
rand_aug = 0
num_tokens = 32
emb_dim = 8
num_layers = 3
vae_hidden_dim = 16
vae_num_resnet_blocks = 1
vae_epochs = 3
vae_batch_size = 16
vae_save_ckpt_freq = 1
transformer_emb = 48
transformer_depth = 2
transformer_heads = 3
num_mask_patches = 8
pt_epochs = 3
pt_batch_size = 16
pt_warmup_steps = 4
pt_save_ckpt_freq = 1
class_labels = 60
class_epochs = 8
class_batch_size = 16
class_update_freq = 2
class_warmup_epochs = 1
class_ema_decay = 0.99
class_save_ckpt_freq = 1
log_every = 1
prepare_workers = 1
device = cpu
expweek =
"""

SCENES = """
data_set = scenes
num_scenes = 4
window_us = 50000
input_H = 64
input_W = 96
sensor_H = 64
sensor_W = 96
num_layers = 3
transformer_emb = 24
transformer_depth = 4
transformer_heads = 2
num_mask_patches = 48
normalize_gain = 2
rand_aug = 0
seg_methods = scratch
seg_labels = 8
seg_classes = 6
seg_blocks = 1 2 3 4
seg_width = 16
seg_aux_width = 8
seg_steps = 24
seg_batch_size = 4
seg_warmup_steps = 2
seg_ema_decay = 0.9
seg_save_ckpt_freq = 4
log_every = 1
prepare_workers = 1
device = cpu
expname = scenes
"""

class Place:
    "Which step the run is in, which folder it trains in, how many updates are done: memory that outlives a kill."
    def __init__(self): self.memory = mmap.mmap(-1, 4096)
    def tell(self, step, folder='', updates=0):
        words = json.dumps([step, str(folder), updates]).encode().ljust(2048)
        self.memory.seek(0); self.memory.write(words)
    def read(self): return json.loads(self.memory[:2048])

PLACE = Place()

def follow():
    "Note each update as it is done."
    original = Trainer._step
    def _step(self, *args):
        original(self, *args)
        if self.acc.is_main_process: PLACE.tell(PLACE.read()[0], self.folder, self.state.step)
    Trainer._step = _step

def configured(step, root):
    "Everything lies in the folder of the run, its recordings, too."
    text,name = (SCENES,'scenes') if step=='segment' else (CONF,'digits')
    return parse_config(text, [f'runs_dir={root}/runs', f'data_path={root}/{name}', *([] if step=='segment' else ['expname=digits'])])

def steps(root):
    "All steps of one run; notes how long each took."
    torch.set_num_threads(1)
    took = {}
    for number,step in enumerate(STEPS):
        PLACE.tell(number); began = time.time()
        run_step(configured(step, root), step)
        took[step] = time.time()-began
    (root/'seconds.json').write_text(json.dumps(took))

def begin(root, processes):
    "The run in a process of its own, or, with several, in a group of its own; gives its id."
    root.mkdir(exist_ok=True); PLACE.tell(-1)
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        if processes>1: os.setpgid(0, 0)
        with open(root/'log', 'a') as f, redirect_stdout(f), redirect_stderr(f):
            steps(root) if processes==1 else launch(steps, processes, root)
        code = 0
    finally: os._exit(code)

def wait(pid, step=None, seconds=0., trained=False):
    "The exit status, or None where the process still runs so many seconds after it came to a step, or had `trained` in it."
    end = None
    while end is None or time.time()<end:
        done,status = os.waitpid(pid, os.WNOHANG)
        if done: return status
        number,folder,_ = PLACE.read()
        if end is None and step and (number>STEPS.index(step) or number==STEPS.index(step) and (folder or not trained)): end = time.time()+seconds
        time.sleep(.002)

def kill(pid, processes):
    "The whole tree, at once."
    if processes==1: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0); return
    try: os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError: os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    end = time.time()+5
    while time.time()<end:          # the others of the tree take a moment to be gone
        try: os.killpg(pid, 0)
        except ProcessLookupError: break
        time.sleep(.01)

def lost():
    "In which step the kill fell, how many updates it had made (None: it was not training), and how many of them have to be done again."
    number,folder,updates = PLACE.read()
    if number<0: return 'start',None,0
    if not folder or is_done(folder): return STEPS[number],None,0
    file = Path(folder)/'last'/'state.pt'
    return STEPS[number],updates,updates-(sound_state(file)['step'] if has_state(file) else 0)

def weights(root): return {str(p.relative_to(root)):p.read_bytes() for p in (root/'runs').rglob('final.safetensors')}

def unbroken(root, processes):
    "A run without a kill."
    if wait(begin(root, processes)): raise RuntimeError(f"the unbroken run failed: {(root/'log').read_text()[-2000:]}")
    return weights(root)

def broken(root, processes, most, chance, took):
    "A run that is killed at most so often; gives what `lost` says of each kill. RuntimeError where it ends by itself with an error."
    fell,planned,now = [],Counter(),0
    while True:
        step = next((s for s in STEPS[now:] if planned[s]<EACH), None) if len(fell)<most else None
        planned[step] += 1
        pid = begin(root, processes)
        status = wait(pid, step, chance.uniform(0, took[step]/2) if step else 0, step!='prepare' and planned[step]==EACH)
        if status==0: return fell
        if status is not None: raise RuntimeError(f"{root.name} failed: {(root/'log').read_text()[-2000:]}")
        kill(pid, processes)
        fell.append(lost())
        now = max(now, PLACE.read()[0])

def summary(fell, runs, seconds, processes):
    "The records so far."
    who,equal,again = '' if processes==1 else f', {processes} processes',sum(k for k,same in runs if same),[n for _,u,n in fell if u is not None]
    made = lambda what,value,unit,**more: record(f'kill -9{who}: {what}', value, unit, **more)
    by_step = [made(f'in {s}', sum(w==s for w,_,_ in fell), f"kills, {sum(w==s and u is not None for w,u,_ in fell)} between updates") for s in ('start',*STEPS)]
    return [made('kills whose run ended bit-equal', equal, f'of {len(fell)}', goal=len(fell)), made('runs', len(runs), 'runs'), *by_step,
            made('updates lost a kill in training, mean; a state every 4 to 12 updates', sum(again)/max(1, len(again)), 'steps', better='lower'),
            made('updates lost a kill in training, most', max(again, default=0), 'steps', goal=12, better='lower'),
            made('the whole soak', seconds, 's', better='lower')]

def soak(kills, seed, processes, root, json_file):
    "Kill and continue, until there were so many kills."
    chance,began,fell,runs = random.Random(seed),time.time(),[],[]
    follow()
    want = unbroken(root/'whole', processes)
    same = unbroken(root/'again', processes)==want
    took = json.loads((root/'again'/'seconds.json').read_text())        # the first also read libraries from disk
    print(f"unbroken: {', '.join(f'{k} {v:.1f} s' for k,v in took.items())}; {len(want)} files of weights; equal when run twice: {same}", flush=True)
    while len(fell)<kills:
        name = root/f'run{len(runs)}'
        new = broken(name, processes, kills-len(fell), chance, took)
        fell += new; runs.append((len(new), weights(name)==want))
        print(f"{name.name}: {len(new)} kills, {'equal' if runs[-1][1] else 'DIFFERENT'}; {len(fell)} of {kills} after {time.time()-began:.0f} s; "
              f"{' '.join(w if u is None else f'{w}@{u}' for w,u,_ in new)}", flush=True)
        records = summary(fell, runs, time.time()-began, processes)
        if json_file: write(json_file, records)
    return records,sum(k for k,same in runs if same)==len(fell)

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--processes', type=int, default=1, help='that share each step')
    parser.add_argument('--json', help='file for the records')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root: records,equal = soak(args.kills, args.seed, args.processes, Path(root), args.json)
    print(table(records)); print(machine())
    raise SystemExit(not equal)
