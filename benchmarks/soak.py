"""Kill training with -9 at random moments, again and again, and compare the weights with those of an unbroken run, bit by bit.

python benchmarks/soak.py --kills 100 --json benchmarks/soak.json

A tiny run of all training steps (tokenizer, pretraining, finetuning with averaged weights, segmentation) is started in a process group of its
own, which is killed as a whole after a random time; the same command continues it, until it ends or is killed again. When it has
ended, every step's weights are compared, and a new run begins, until so many kills have been made. Attempts are forks of this
process, which has imported everything, so that a start is cheap.
"""
import argparse, mmap, os, random, signal, struct, tempfile, time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
import torch
from common import machine, record, table, write
from mem_nb.config import parse_config
from mem_nb.datasets import prepared
from mem_nb.labelled import labelled
from mem_nb.pipeline import run_step
from mem_nb.processes import launch
from mem_nb.state import has_state, is_done, sound_state
from mem_nb.train import Trainer
import mem_nb.finetune, mem_nb.pretrain, mem_nb.segment, mem_nb.tokenizer   # imported once, for all forks

STEPS = ('tokenizer','pretrain','finetune')
CONF = """
data_set = digits
num_digits = 80
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
vae_epochs = 8
vae_batch_size = 16
vae_save_ckpt_freq = 1
transformer_emb = 48
transformer_depth = 2
transformer_heads = 3
num_mask_patches = 8
pt_epochs = 8
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
device = cpu
expname = scenes
"""

class Place:
    "Which folder the training is in, and how many of its steps are done: memory that outlives a kill."
    def __init__(self): self.memory = mmap.mmap(-1, 4096)
    def tell(self, folder, step):
        name = str(folder).encode()
        self.memory.seek(0); self.memory.write(struct.pack('<qq', step, len(name))+name)
    def forget(self): self.tell('', 0)
    def read(self):
        step,n = struct.unpack('<qq', self.memory[:16])
        return self.memory[16:16+n].decode(), step

def follow(place):
    "Note each step of the training as it is done."
    original = Trainer._step
    def _step(self, *args):
        original(self, *args)
        if self.acc.is_main_process: place.tell(self.folder, self.state.step)
    Trainer._step = _step

def configured(name, root): return parse_config(CONF, [f'expname={name}', f'runs_dir={root}/runs', f'data_path={root}/digits'])

def scenes(name, root): return parse_config(SCENES, [f'expweek={name}', f'runs_dir={root}/runs', f'data_path={root}/scenes'])   # in the run's folder

def steps(name, root):
    "All training steps of one run."
    torch.set_num_threads(1)
    for step in STEPS: run_step(configured(name, root), step)
    run_step(scenes(name, root), 'segment')

def begin(name, root, processes):
    "The run in a process group of its own; gives its id."
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        os.setpgid(0, 0)
        with open(root/'log', 'a') as f, redirect_stdout(f), redirect_stderr(f):
            steps(name, root) if processes==1 else launch(steps, processes, name, root)
        code = 0
    finally: os._exit(code)

def wait(pid, seconds=None):
    "The exit status, or None where the process still runs after so many seconds."
    end = None if seconds is None else time.time()+seconds
    while end is None or time.time()<end:
        done,status = os.waitpid(pid, os.WNOHANG)
        if done: return status
        time.sleep(.005)

def kill(pid):
    "The whole tree, at once."
    try: os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError: os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    end = time.time()+5
    while time.time()<end:          # the others of the tree take a moment to be gone
        try: os.killpg(pid, 0)
        except ProcessLookupError: break
        time.sleep(.01)

def lost(place):
    "Where the kill fell, and how many steps have to be done again."
    folder,step = place.read()
    if not folder: return 'start',0
    folder = Path(folder)
    where = folder.parent.name if folder.parent.name in ('finetune','segment') else folder.name
    if is_done(folder): return f'after {where}',0
    file = folder/'last'/'state.pt'
    return where, step-(sound_state(file)['step'] if has_state(file) else 0)

def weights(name, root):
    return {str(p.relative_to(root/'runs'/name)):p.read_bytes() for p in (root/'runs'/name).rglob('final.safetensors')}

def soak(
    kills:int,      # how many
    seed:int,       # of the moments
    processes:int,  # that share each step
    root:Path,      # folder for everything
) -> tuple:         # per kill (where, steps lost), per run (kills, equal?), seconds
    "Kill and continue; raises RuntimeError where a run ends by itself with an error."
    chance,place,began = random.Random(seed),Place(),time.time()
    follow(place)
    prepared(configured('whole', root)); labelled(scenes('whole', root))    # simulated and packed once; the training is what is killed
    if wait(begin('whole', root, processes)): raise RuntimeError(f"the unbroken run failed: {(root/'log').read_text()[-2000:]}")
    start = time.time()
    if wait(begin('again', root, processes)): raise RuntimeError('the second run failed')
    length,want,fell,runs = time.time()-start,weights('whole', root),[],[]
    print(f'unbroken: {length:.1f} s, {len(want)} files of weights; equal when run twice: {weights("again", root)==want}', flush=True)
    while len(fell)<kills:
        name,before,done = f'run{len(runs)}',len(fell),False
        while not done:
            place.forget()
            pid = begin(name, root, processes)
            status = wait(pid, chance.uniform(0, length/6) if len(fell)<kills else None)
            if status is None: kill(pid); fell.append(lost(place))
            elif status: raise RuntimeError(f"{name} failed: {(root/'log').read_text()[-2000:]}")
            else: done = True
        runs.append((len(fell)-before, weights(name, root)==want))
        print(f'{name}: {runs[-1][0]} kills, {"equal" if runs[-1][1] else "DIFFERENT"}; {len(fell)} of {kills} after {time.time()-began:.0f} s', flush=True)
    return fell,runs,time.time()-began

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--processes', type=int, default=1, help='that share each step')
    parser.add_argument('--json', help='file for the records')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root: fell,runs,seconds = soak(args.kills, args.seed, args.processes, Path(root))
    again = [n for _,n in fell]
    for where in sorted({w for w,_ in fell}): print(f'  {where}: {sum(w==where for w,_ in fell)} kills, at most {max(n for w,n in fell if w==where)} steps lost')
    who = '' if args.processes==1 else f', {args.processes} processes'
    equal = sum(k for k,same in runs if same)
    records = [record(f'kill -9{who}: kills whose run ended bit-equal', equal, f'of {len(fell)}', goal=len(fell)),
               record(f'kill -9{who}: runs', len(runs), 'runs'),
               record(f'kill -9{who}: steps lost a kill, mean; a state every 4 steps', sum(again)/len(again), 'steps', better='lower'),
               record(f'kill -9{who}: steps lost a kill, most', max(again), 'steps', goal=4, better='lower'),
               record(f'kill -9{who}: the whole soak', seconds, 's', better='lower')]
    print(table(records)); print(machine())
    if args.json: write(args.json, records); print(f'records: {args.json}')
    raise SystemExit(equal!=len(fell))
