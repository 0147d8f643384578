"Many processes: they take the steps of one, stop together, and continue to the weights of an unbroken run."
import errno, json, os, re, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from conftest import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
CONF = """
data_set = digits
num_digits = 77
val_fraction = 0.19
data_path = digits
input_H = 32
input_W = 32
frame_fit = crop
slice_max_evs = 2000
rotate = 14
rand_aug = 0
geometry = frames
num_tokens = 32
emb_dim = 8
num_layers = 3
vae_hidden_dim = 16
vae_num_resnet_blocks = 1
vae_epochs = 2
vae_batch_size = 16
vae_lr = 1e-3
transformer_emb = 48
transformer_depth = 2
transformer_heads = 3
num_mask_patches = 8
pt_epochs = 4
pt_batch_size = 16
pt_warmup_steps = 2
pt_dropout = 0.3
class_labels = 40
class_epochs = 3
class_batch_size = 16
class_update_freq = 2
class_warmup_epochs = 0
class_dropout = 0.3
class_ema_decay = 0.99
class_methods = scratch
log_every = 1
device = cpu
precision = fp32
expweek =
"""
# what is trained in one process and in two: name -> (step, settings)
CASES = {'tokens':('pretrain', []), 'random':('pretrain', ['masking=random']), 'event':('pretrain', ['masking=event']),
         'informative':('pretrain', ['pt_informative=1.2', 'masking=random']), 'mae':('pretrain', ['mae=1']),
         'mae_informative':('pretrain', ['mae=1', 'pt_norm_pix=1', 'pt_informative=1']),
         'contrast':('pretrain', ['mae=1', 'pt_contrast=.5']), 'finetune':('finetune', []),
         'held_out':('finetune', ['class_keep=held_out']), 'mixed':('finetune', ['class_mixup=.8', 'class_cutmix=1']), 'balanced':('finetune', ['class_balanced=1']),
         'drop':('finetune', ['event_drop=.3', 'bend=.05', 'flip=.5']),
         'tokenizer':('tokenizer', [])}
SHARDED = ('tokens','mae','contrast','finetune','held_out','tokenizer')    # also with the model shared out
WORDS = "import sys; sys.path.insert(0, sys.argv[1])\nfrom test_processes import main; main(*sys.argv[2:])"

def words(name, settings):
    tokens = [] if name=='tokenizer' else ['vae_skip=1', 'vae_checkpoint=vae.safetensors']
    return [*tokens, *settings, f'expname={name}']

# ---- what the processes do; this part runs outside of pytest
def together(cases):
    "Under torchrun: every case in two processes, one after the other."
    from mem_nb.pipeline import command
    for name,(step,settings) in cases.items(): command(step, 'x.conf', words(f'two_{name}', settings))
    for name in SHARDED: command(cases[name][0], 'x.conf', words(f'cut_{name}', [*cases[name][1], 'shard=1']))

def at_step(number, do, rank=None):
    "Do something in the middle of a step: after the gradients, before the weights have moved."
    from mem_nb import train
    from mem_nb.config import process_rank
    original = train.train_step
    def train_step(acc, state, *args):
        if state.step==number and rank in (None, process_rank()[0]): do()
        return original(acc, state, *args)
    train.train_step = train_step

def sparse(folder, dies=None):
    "A line of the log every ten steps, a state every four; each process has its own batches."
    import signal
    from mem_nb.config import RunConfig, process_rank
    from mem_nb.train import fit
    from test_train import Points, loss_fn
    torch.set_num_threads(1); torch.manual_seed(0)
    model,draw = torch.nn.Linear(4, 1),lambda k: Points(torch.randn(8, 4, generator=torch.Generator().manual_seed(2*k+process_rank()[0])))
    if dies: at_step(dies, lambda: os.kill(os.getpid(), signal.SIGKILL), 1)
    fit(model, loss_fn, lambda start,stop: map(draw, range(start, stop)), 20, folder, torch.optim.AdamW(model.parameters()), lambda k: 1e-2,
        RunConfig(device='cpu', precision='fp32', log_every=10), save_every=4)

def averaged():
    "A model that is averaged and shared out, validated by its methods rather than by a call."
    from mem_nb.config import RunConfig
    from mem_nb.encoder import build_encoder
    from mem_nb.train import fit
    from test_train import Points
    torch.manual_seed(0)
    model,frames = build_encoder((16,16), 8, width=24, depth=2, heads=2, shared_bias=False, num_classes=2),torch.rand(4, 3, 16, 16)
    def validate(m):
        whole = m.forward_head(m.forward_features(frames))
        return dict(first=whole.mean(), again=m(frames).mean(), numbers=sum(p.numel() for p in m.patch_embed.parameters()))
    fit(model, lambda m, batch, step, generator: (m(batch.x).square().mean(), {}), lambda start,stop: (Points(frames) for _ in range(start, stop)), 4, 'averaged',
        torch.optim.AdamW(model.parameters()), lambda k: 1e-2, RunConfig(device='cpu', precision='fp32', shard=True, log_every=1), ema_decay=.5, validate=validate, validate_every=1)

class Tiny(torch.nn.Module):
    "A convolution, a batch norm, two blocks."
    def __init__(self):
        super().__init__()
        self.stem,self.norm = torch.nn.Conv2d(3, 8, 3, bias=False),torch.nn.BatchNorm2d(8)     # a bias would move by rounding alone
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()) for _ in range(2)])
    def forward(self, x):
        x = self.norm(self.stem(x)).relu().mean((2,3))
        for b in self.blocks: x = x+b(x)
        return x

def compiled(folder, how, dies=None):
    "Batch norm, averaged weights, `shard` and `compile` together, or without; how many graphs were compiled."
    import signal
    from mem_nb.config import RunConfig, process_rank
    from mem_nb.train import fit
    from test_train import Points
    torch.set_num_threads(1); torch.manual_seed(0); torch._dynamo.reset(); torch._dynamo.utils.counters.clear()
    rank,world = process_rank()
    frames = lambda k: Points(torch.rand(8, 3, 10, 10, generator=torch.Generator().manual_seed(k))[rank*8//world:(rank+1)*8//world])
    model = Tiny()
    if dies: at_step(dies, lambda: os.kill(os.getpid(), signal.SIGKILL), 1)
    fit(model, lambda m, batch, step, generator: ((m(batch.x)-batch.x.mean((1,2,3))[:,None]).square().mean(), {}), lambda start,stop: map(frames, range(start, stop)), 12, folder,
        torch.optim.AdamW(model.parameters()), lambda k: 1e-2, RunConfig(device='cpu', precision='fp32', log_every=1, **how), save_every=4, ema_decay=.5,
        validate=lambda m: dict(loss=m(frames(99).x).square().mean()), validate_every=6)
    return torch._dynamo.utils.counters['stats']['unique_graphs']

class Maps:
    "Seventeen random pictures with label maps, as `LabelledSet` gives them."
    pictures,maps = torch.randint(0, 256, (17,3,24,32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)),torch.arange(17*24*32).view(17,24,32)//97%4
    def __len__(self): return 17
    def batch(self, indices, max_events=None, rows=None):
        from mem_nb.labelled import LabelBatch
        return LabelBatch(None, self.pictures[indices], self.maps[indices].to(torch.uint8), rows)

def judged():
    "Every validation of untrained models, shared by the processes there are; all of them must know what the first knows."
    from mem_nb.config import load_config, process_rank
    from mem_nb.encoder import build_encoder
    from mem_nb.finetune import build_classifier, predict
    from mem_nb.metrics import accuracy_metrics
    from mem_nb.pretrain import build_model, pretrain_task
    from mem_nb.probes import knn_signal
    from mem_nb.pyramid import Segmenter
    from mem_nb.segment import score_numbers, segmentation_score
    from mem_nb.shard import first_says
    from mem_nb.tokenizer import load_tokenizer, tokenizer_metrics
    from mem_nb.train import make_accelerator
    torch.set_num_threads(1)
    cfg = load_config('x.conf', words('judged', []))
    make_accelerator(cfg.run)
    task = pretrain_task(cfg); task.batch_size = 8; val = task.val
    torch.manual_seed(0)
    found,model = dict(samples=len(val)),build_classifier(cfg, 10, head_scale=1.).eval()
    pixels = Segmenter(build_encoder((24,32), 8, width=24, depth=4, heads=2, shared_bias=False), 4, (1,2,3,4), 16, 8).eval()
    pixels.head[1].weight.data.mul_(50)                                               # else it says the same everywhere
    with torch.no_grad():
        found['tokenizer'] = tokenizer_metrics(load_tokenizer(cfg), val, cfg.data, torch.zeros(3,32,32), batch_size=8, shared=True)
        found['finetune'] = accuracy_metrics(predict(model, val, cfg.data, 8, slices=2, shared=True), torch.from_numpy(val.labels))
        for kind in ('block','random','event'): found[kind] = replace_kind(task, kind).validate(build_model(cfg).eval())
        found['knn'] = knn_signal(model, task.train, cfg.data, shared=True)
    found['segment'] = score_numbers(segmentation_score(pixels, Maps(), cfg.data, batch_size=8, shared=True), list('abcd'))
    found = {k:{n:float(x) for n,x in v.items()} if isinstance(v, dict) else v for k,v in found.items()}
    assert first_says(found, process_rank()[1]>1)==found
    return found

def replace_kind(task, kind): task.kind = kind; return task

def threads_set(launch):
    "What a process sets before its function begins."
    calls,was = [],torch.set_num_threads
    torch.set_num_threads = lambda n: (calls.append(n), was(n))
    try: return launch(lambda: list(calls), 2)
    finally: torch.set_num_threads = was

def scenes(out):
    "Forks of one process, which has all imports: each scene breaks a run and continues it."
    import signal, warnings
    torch.set_num_threads(1)
    from mem_nb.pipeline import command
    from mem_nb.processes import launch
    from mem_nb.state import read_state
    from mem_nb.store import locked
    told,state = {},lambda name: Path('runs', name, 'pretrain', 'last', 'state.pt')
    send = lambda number: lambda: os.kill(os.getpid(), number)
    def run(name, at=None, do=None, rank=None, settings=()):
        def work():
            if at is not None: at_step(at, do, rank)
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter('always')
                command('pretrain', 'x.conf', words(name, settings))
            return [str(w.message) for w in found]
        try: return dict(warned=launch(work, 2))
        except RuntimeError as e: return dict(error=str(e), step=read_state(state(name))['step'] if state(name).exists() else 0)
    def grumble(): raise ValueError('no more coffee')
    often = ['pt_save_ckpt_freq=1']             # does not decide the result
    told['killed'] = run('killed', 9, send(signal.SIGKILL), 1, often); told['killed_lock'] = Path('runs/killed/.pretrain.lock').exists(); run('killed')
    told['usr1'] = run('usr1', 5, send(signal.SIGUSR1)); told['usr1_again'] = run('usr1', 9, send(signal.SIGTERM), 1)
    file = state('usr1'); raw = bytearray(file.read_bytes()); raw[len(raw)//2] ^= 1; file.write_bytes(raw)
    told['damaged'] = run('usr1')
    told['error'] = run('error', 3, grumble, 1)
    with locked(Path('runs/held/pretrain'), 'training in'): told['held'] = run('held')
    told['held_pid'] = os.getpid()
    told['threads'] = threads_set(launch)
    launch(sparse, 2, 'calm'); launch(averaged, 2)
    try: launch(sparse, 2, 'sparse', 9)
    except RuntimeError: told['sparse'] = read_state('sparse/last/state.pt')['step']
    launch(sparse, 2, 'sparse')
    both = dict(shard=True, compile=True)
    told['graphs'] = [launch(compiled, 1, 'plain', {}), launch(compiled, 2, 'both', both)]
    try: launch(compiled, 2, 'both_killed', both, 6)
    except RuntimeError: told['both_killed'] = read_state('both_killed/last/state.pt')['step']
    launch(compiled, 2, 'both_killed', both)
    told['odd'] = run('odd', settings=['pt_batch_size=15'])
    told['judged'] = [launch(judged, n) for n in (1,2,3)]
    Path(out).write_text(json.dumps(told))

def main(what, out=''):
    from mem_nb import pipeline
    if what=='together': together(CASES)
    if what=='scenes': scenes(out)
    if what in ('stop','error'):                # the command itself, under torchrun
        import signal
        def error(): raise ValueError('no more coffee')
        at_step(7, error if what=='error' else lambda: os.kill(os.getpid(), signal.SIGUSR1), 1)
        pipeline.main(['pretrain', 'x.conf', *words(out, [])])

# ---- from here on pytest
def start(folder, *args, processes=0):
    "Run a script in the folder, under torchrun where there should be several processes."
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]
    env = dict(os.environ, TQDM_DISABLE='1', MPLBACKEND='agg', OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    return subprocess.run([*(torchrun if processes else [sys.executable]), *map(str, args)], cwd=folder, capture_output=True, text=True, env=env, timeout=300)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Every case in two processes and in one."
    from mem_nb.config import load_config
    from mem_nb.pipeline import command
    from mem_nb.state import save_weights
    from mem_nb.tokenizer import build_tokenizer
    folder = tmp_path_factory.mktemp('processes')
    (folder/'x.conf').write_text(CONF); (folder/'words.py').write_text(WORDS)
    (folder/'command.py').write_text("from mem_nb.pipeline import main; main()")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        torch.manual_seed(0)
        save_weights(build_tokenizer(load_config('x.conf')), 'vae.safetensors')
        for name,(step,settings) in CASES.items(): command(step, 'x.conf', words(f'one_{name}', settings))
    done = start(folder, 'words.py', ROOT/'tests', 'together', processes=2)
    assert done.returncode==0, '\n'.join(l for l in done.stderr.splitlines() if 'rank1' not in l)[:6000]
    return folder

def log_of(folder, name):
    step = CASES[name.partition('_')[2]][0]
    return [json.loads(line) for line in next((folder/'runs'/name).glob(f'{step}/**/log.jsonl')).read_text().splitlines()]

def final(folder, name): return (folder/'runs'/name/'pretrain'/'final.safetensors').read_bytes()

@pytest.mark.parametrize('name', [n for n in CASES if n!='tokenizer'])
def test_two_processes_take_the_steps_of_one(folder, name):
    one,two = (log_of(folder, f'{n}_{name}') for n in ('one','two'))
    assert len(one)==len(two)>=3
    kept = [k for k in one[-1] if k in ('loss','grad_norm','accuracy','contrast','partner') or k.startswith(('val_','masked_','commonest'))]
    assert {'loss','grad_norm'} < set(kept) and any(k.startswith('val_') for k in kept)
    for a,b in zip(one, two):
        for k in set(kept) & a.keys(): assert b[k]==pytest.approx(a[k], rel=1e-5 if k=='loss' else 1e-4, abs=1e-7), (a['step'], k)

def test_two_processes_take_the_steps_of_one_in_the_tokenizer(folder):
    one,two = (log_of(folder, f'{n}_tokenizer') for n in ('one','two'))
    for a,b in zip(one, two):
        for k in ('loss','recon','usage','grad_norm','codes_in_batch'): assert b[k]==pytest.approx(a[k], rel=1e-5 if k=='loss' else 1e-4), (a['step'], k)

@pytest.mark.parametrize('name', SHARDED)
def test_a_model_shared_out_takes_the_same_steps_and_leaves_whole_files(folder, name):
    from safetensors.torch import load_file
    two,cut = (log_of(folder, f'{n}_{name}') for n in ('two','cut'))
    assert len(two)==len(cut)>=3
    for a,b in zip(two, cut):
        for k in a.keys() & {'loss','grad_norm','val_accuracy','val_loss','val_masked_accuracy','val_held_out_accuracy'}:
            assert b[k]==pytest.approx(a[k], rel=1e-4, abs=1e-6), (a['step'], k)
    a,b = (load_file(next((folder/'runs'/f'{n}_{name}').glob(f'{CASES[name][0]}/**/final.safetensors'))) for n in ('two','cut'))
    assert a.keys()==b.keys() and all(a[k].shape==b[k].shape for k in a)
    assert max((a[k].double()-b[k].double()).abs().max().item() for k in a) < 2e-3

def test_fp16_is_refused_where_the_model_is_shared_out():
    from types import SimpleNamespace
    from mem_nb.shard import share_out
    with pytest.raises(ValueError, match='shard = 1 does not go with precision = fp16'): share_out(None, None, None, None, SimpleNamespace(scaler=1))

@pytest.fixture(scope='module')
def told(folder):
    done = start(folder, 'words.py', ROOT/'tests', 'scenes', folder/'told.json')
    assert done.returncode==0, done.stderr[:4000]+' … '+done.stderr[-2000:]
    return json.loads((folder/'told.json').read_text())

def test_kill_9_of_one_process_ends_both_and_the_same_command_continues(folder, told):
    assert 'process 1 of 2' in told['killed']['error'] and 'SIGKILL' in told['killed']['error']
    assert told['killed']['step']==8       # saved every four steps
    assert final(folder, 'killed')==final(folder, 'two_tokens')

def test_the_log_of_a_killed_run_is_that_of_an_unbroken_one(folder, told):
    "What was summed since the last line is part of the state: of both processes, not of the first alone."
    assert told['sparse']==8
    calm,sparse = ([json.loads(l) for l in (folder/n/'log.jsonl').read_text().splitlines()] for n in ('calm','sparse'))
    assert [r['step'] for r in sparse]==[10,20]
    clocks = {'images_s','step_seconds','seconds'}
    for a,b in zip(calm, sparse, strict=True): assert {k:v for k,v in a.items() if k not in clocks}=={k:v for k,v in b.items() if k not in clocks}

def test_an_averaged_model_that_is_shared_out_can_be_validated_by_its_methods(folder, told):
    lines = [json.loads(l) for l in (folder/'averaged'/'log.jsonl').read_text().splitlines()]
    assert len(lines)==4 and len({r['val_first'] for r in lines})==4
    for r in lines: assert r['val_first']==r['val_again'] and r['val_numbers']==24*3*64+24

def test_compiled_and_shared_out_at_once_takes_the_steps_of_one_and_resumes_to_the_same_bits(folder, told):
    "With a batch norm, whose statistics are those of the whole batch."
    from safetensors.torch import load_file
    plain,both = ([json.loads(l) for l in (folder/n/'log.jsonl').read_text().splitlines()] for n in ('plain','both'))
    assert told['graphs'][0]==0 and told['graphs'][1]>0 and len(plain)==12
    for a,b in zip(plain, both, strict=True): assert b['loss']==pytest.approx(a['loss'], rel=1e-5) and b['grad_norm']==pytest.approx(a['grad_norm'], rel=1e-4)
    a,b = (load_file(folder/n/'final.safetensors') for n in ('plain','both'))
    assert a.keys()==b.keys() and all(torch.allclose(a[k], b[k], atol=1e-5) for k in a) and int(a['norm.num_batches_tracked'])==12
    assert told['both_killed']==4
    assert (folder/'both'/'final.safetensors').read_bytes()==(folder/'both_killed'/'final.safetensors').read_bytes()

def test_a_signal_to_all_or_to_one_loses_nothing_and_a_damaged_state_is_replaced(folder, told):
    assert told['usr1']['step']==6 and 'asked to stop at step 6 of 15; saved in' in told['usr1']['error']
    assert told['usr1_again']['step']==10 and 'asked to stop at step 10' in told['usr1_again']['error']
    warned = [w for w in told['damaged']['warned'] if 'state.pt' in w]
    assert len(warned)==1 and 'damaged' in warned[0] and 'going on from the state before it, step 6' in warned[0]
    assert final(folder, 'usr1')==final(folder, 'two_tokens')

def test_an_error_in_one_process_ends_both_with_its_words(told):
    assert told['error']['error']=='process 1 of 2: ValueError: no more coffee'

def test_the_thread_pool_is_mended_before_the_function(told):
    "Else autograd's threads do it all at once, and one of them aborts the process (pytorch#178535)."
    assert told['threads']==[1]

def test_a_folder_in_use_names_the_process_that_holds_it(told):
    assert f"process {told['held_pid']} on " in told['held']['error'] and 'is training in runs/held/pretrain; wait for it' in told['held']['error']

def test_a_batch_that_cannot_be_shared_is_refused(told):
    assert 'a batch of 15 cannot be shared by 2 processes; take a multiple of 2' in told['odd']['error']

def test_a_validation_shared_by_two_or_three_is_that_of_one(told):
    "Nobody is seen twice, nobody is left out; the last batch of 17 has one sample, so that others have none."
    one = told['judged'][0]
    assert one['samples']==17
    for more in told['judged'][1:]:
        assert more.keys()==one.keys()
        for step,want in one.items():
            if step=='samples': continue
            assert more[step].keys()==want.keys() and want
            for k,v in want.items():
                if k in ('loss','recon','mean_frame_recon','cross_entropy','calibration_error'): assert more[step][k]==pytest.approx(v, rel=1e-5), (step, k)
                else: assert more[step][k]==v, (step, k)

def test_under_accelerate_launch(folder):
    pytest.importorskip('accelerate.commands.launch')
    launcher = ['-m','accelerate.commands.launch','--multi_gpu','--num_processes','2','--num_machines','1','--mixed_precision','no','--dynamo_backend','no','--main_process_port','0']
    done = start(folder, *launcher, 'command.py', 'pretrain', 'x.conf', *words('accelerated', []))
    assert done.returncode==0 and done.stdout.count('hidden tokens named')==1, done.stderr[-3000:]
    assert final(folder, 'accelerated')==final(folder, 'two_tokens')

def test_the_command_under_torchrun_stops_with_status_75_and_continues(folder):
    done = start(folder, 'words.py', ROOT/'tests', 'stop', 'signalled', processes=2)
    assert 'asked to stop at step 8 of 15' in done.stdout and re.search(r'exitcode\s*: 75', done.stderr), done.stderr[-3000:]
    done = start(folder, 'command.py', 'pretrain', 'x.conf', *words('signalled', []), processes=2)
    assert done.returncode==0 and done.stdout.count('hidden tokens named')==1, done.stderr[-3000:]          # the first speaks
    assert final(folder, 'signalled')==final(folder, 'two_tokens')

def test_an_error_under_torchrun_names_its_process(folder):
    done = start(folder, 'words.py', ROOT/'tests', 'error', 'failed', processes=2)
    assert done.returncode!=0 and 'mem_nb pretrain (process 1 of 2): no more coffee' in done.stderr

# ---- one process is enough for these
def train(folder, steps=20):
    from test_train import train
    return train(folder, steps=steps)

def test_a_lock_left_by_a_killed_process_does_not_stick(tmp_path):
    code = f"import os, signal; from pathlib import Path; from mem_nb.store import locked\nwith locked(Path({str(tmp_path/'a')!r}), 'training in'): os.kill(os.getpid(), signal.SIGKILL)"
    assert start(tmp_path, '-c', code).returncode==-9 and (tmp_path/'.a.lock').exists()
    train(tmp_path/'a')
    assert not (tmp_path/'.a.lock').exists()

def test_a_full_disk_while_saving_loses_nothing(tmp_path, monkeypatch):
    train(tmp_path/'whole')
    save,states = torch.save,[]
    def full(obj, path):
        states.append(obj['step'])
        if len(states)==1: return save(obj, path)
        Path(path).write_bytes(b'half'); raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(torch, 'save', full)
        with pytest.raises(OSError, match='disk is full, .*state.pt was not written. Free some space and run the same command again'): train(tmp_path/'a')
    assert states==[7,14] and torch.load(tmp_path/'a'/'last'/'state.pt', weights_only=True)['step']==7
    assert not list((tmp_path/'a').rglob('*.tmp'))
    train(tmp_path/'a')
    assert (tmp_path/'a'/'final.safetensors').read_bytes()==(tmp_path/'whole'/'final.safetensors').read_bytes()

def test_whatever_cannot_be_written_is_told_in_a_sentence(tmp_path, monkeypatch, capsys):
    "Also where nobody thought of it: in the log, in the configuration."
    from mem_nb import pipeline
    from mem_nb.status import run_status
    monkeypatch.chdir(tmp_path)
    (tmp_path/'x.conf').write_text(CONF)
    for number,said in ((errno.ENOSPC, 'the disk is full: there. Free some space and run the same command again'), (errno.EROFS, 'read-only file system: there; runs_dir = … says where runs lie')):
        def refuse(*args): raise OSError(number, os.strerror(number), 'there')
        with monkeypatch.context() as m:
            m.setattr(pipeline, 'save_config', refuse)
            with pytest.raises(SystemExit, match=f'mem_nb prepare: {said}'): pipeline.main(['prepare', 'x.conf'])
    (tmp_path/'runs'/'run').mkdir(parents=True); (tmp_path/'runs'/'run'/'failed.txt').touch()      # what a full disk leaves
    assert 'could not say why' in run_status(tmp_path/'runs'/'run', ['pretrain'])['why']

CTRL_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from mem_nb import train
step = train.train_step
def train_step(acc, state, *args):
    if state.step==7: [os.kill(os.getpid(), signal.SIGINT) for _ in range(int(sys.argv[2]))]
    return step(acc, state, *args)
train.train_step = train_step
from mem_nb.pipeline import main
main(['pretrain', 'x.conf', 'mae=1', 'expname='+sys.argv[1]])
"""

def test_ctrl_c_saves_and_a_second_one_ends_at_once(folder):
    (folder/'ctrl_c.py').write_text(CTRL_C)
    once,twice = (start(folder, 'ctrl_c.py', name, n) for name,n in (('once',1),('twice',2)))
    assert once.returncode==75 and 'asked to stop at step 8 of 15; saved' in once.stdout, once.stderr[-2000:]
    assert twice.returncode==1 and 'interrupted; run the same command again to continue' in twice.stderr and not (folder/'runs/twice/pretrain/last').exists()
    for name in ('once','twice'): assert start(folder, 'ctrl_c.py', name, 0).returncode==0
    a,b = (final(folder, name) for name in ('once','twice'))
    assert a==b

def test_a_read_only_folder_is_named(tmp_path, monkeypatch):
    def refuse(path, *args): raise OSError(errno.EROFS, 'Read-only file system', str(path))
    monkeypatch.setattr('mem_nb.store.open', refuse, raising=False)
    with pytest.raises(OSError, match=f"cannot write in {tmp_path}: Read-only file system"): train(tmp_path/'a')

def test_informative_losses_divide_by_the_count_of_all(monkeypatch):
    "Each process has its rows; the mean of the losses, and of the gradients, is that of the whole batch."
    from mem_nb import targets
    values,counts = torch.randn(12, requires_grad=True),torch.arange(12)%5==0
    counts[:6] = False; counts[2] = True                                              # one in the first half, more in the second
    whole = targets.counted_mean(values, counts); whole.backward()
    want,values.grad = values.grad.clone(),None
    monkeypatch.setattr(targets.dist, 'is_initialized', lambda: True); monkeypatch.setattr(targets.dist, 'get_world_size', lambda: 2)
    monkeypatch.setattr(targets, 'summed', lambda n: counts.sum())
    parts = [targets.counted_mean(values[s], counts[s]) for s in (slice(0,6), slice(6,12))]
    (sum(parts)/2).backward()
    assert torch.allclose(sum(parts)/2, whole) and torch.allclose(values.grad, want)
