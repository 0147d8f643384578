"Training: what makes a killed run end where an unbroken one does, and what stops a run that cannot go on."
import json, os
from copy import deepcopy
from dataclasses import dataclass, replace
import numpy as np, pytest, torch
from torch import nn
from mem_nb.config import Config, RunConfig
from mem_nb.train import Trainer, atomic, compile_model, cosine_schedule, fit, load_weights, read_log, save_weights, step_generator, step_settings

@dataclass
class Points:
    x:torch.Tensor
    def __len__(self): return len(self.x)
    def to(self, device): return self

def batches(start, stop): return (Points(torch.randn(8, 4, generator=torch.Generator().manual_seed(k))) for k in range(start, stop))

def loss_fn(model, batch, step, generator):
    noise = torch.randn(batch.x.shape, generator=generator)
    return (model(batch.x+.1*noise)-batch.x.sum(1, keepdim=True)).square().mean(), {}

def train(folder, loss_fn=loss_fn, steps=40, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4,16), nn.Dropout(.1), nn.ReLU(), nn.Linear(16,1))
    metrics = fit(model, loss_fn, batches, steps, folder, torch.optim.AdamW(model.parameters()), lambda k: cosine_schedule(k, steps, 1e-2, warmup=5),
                  RunConfig(device='cpu', log_every=4), **dict(save_every=7, **kwargs))
    return model,metrics

@pytest.mark.parametrize('kwargs', [{}, dict(accumulate=2), dict(ema_decay=.9), dict(grad_clip=.1)])
def test_interrupted_run_equals_unbroken_run(tmp_path, kwargs):
    _,whole = train(tmp_path/'whole', **kwargs)
    calls = 0
    def dies(*args):
        nonlocal calls; calls += 1
        if calls==25: raise KeyboardInterrupt
        return loss_fn(*args)
    with pytest.raises(KeyboardInterrupt): train(tmp_path/'broken', dies, **kwargs)
    assert (tmp_path/'broken'/'last'/'state.pt').exists()
    _,resumed = train(tmp_path/'broken', **kwargs)
    assert (tmp_path/'whole'/'final.safetensors').read_bytes()==(tmp_path/'broken'/'final.safetensors').read_bytes()
    assert [r['loss'] for r in read_log(tmp_path/'whole')]==[r['loss'] for r in read_log(tmp_path/'broken')]

def test_defect_13_short_run_with_long_warmup_does_not_crash():
    rates = [cosine_schedule(k, 10, 1., warmup=1000) for k in range(10)]
    assert max(rates)==1. and rates[0]<rates[1]

@pytest.mark.parametrize('name', ['pt_like','ft_like','nowarm'])
def test_schedule_agrees_with_the_original(shared, name):
    z = np.load(shared/'golden'/'schedules.npz')
    args,want = json.loads(str(z[f'{name}/args'])),z[name]
    warmup = args['warmup_steps'] if args.get('warmup_steps', -1)>0 else args.get('warmup_epochs', 0)*args['niter_per_ep']
    got = [cosine_schedule(k, len(want), args['base_value'], args['final_value'], warmup) for k in range(len(want))]
    assert np.allclose(got, want, rtol=1e-9, atol=1e-12)

def test_changed_settings_are_refused_and_named(tmp_path):
    train(tmp_path, settings={'pt_lr':1})
    with pytest.raises(ValueError, match='pt_lr was 1, is now 2'): train(tmp_path, settings={'pt_lr':2})

def test_nan_loss_stops_keeps_the_last_state_and_tells_the_way_on(tmp_path):
    tmp_path = tmp_path/'pretrain'            # the step whose start pt_checkpoint is
    def explodes(model, batch, step, generator): return loss_fn(model, batch, step, generator)[0]*(float('nan') if step==20 else 1), {}
    with pytest.raises(FloatingPointError, match='loss nan, gradient norm nan at step 20, learning rate .* state of step 14 is kept in .*state.pt; pt_checkpoint can begin from it, or from the save before, .*before.pt, where'):
        train(tmp_path, explodes)
    file = tmp_path/'last'/'state.pt'
    kept = torch.load(file, weights_only=True)
    assert kept['step']==14
    again = load_weights(nn.Sequential(nn.Linear(4,16), nn.Dropout(.1), nn.ReLU(), nn.Linear(16,1)), file)   # as a start with other settings
    assert all(torch.equal(v, kept['model'][k]) for k,v in again.state_dict().items())
    with pytest.raises(FloatingPointError, match='state of step 14 is kept'): train(tmp_path, explodes)      # a session that saved nothing itself
    _,m = train(tmp_path)
    assert np.isfinite(m['loss'])

def at_steps(bad):
    "A finite loss whose gradient is no number at some steps."
    def loss(model, batch, step, generator):
        plain,metrics = loss_fn(model, batch, step, generator)
        return (plain + (model[0].weight.sum()*0).abs().sqrt() if bad(step) else plain), metrics
    return loss

def test_nan_before_any_saved_state_and_infinite_gradients(tmp_path):
    def explodes(model, batch, step, generator): return loss_fn(model, batch, step, generator)[0]*float('nan'), {}
    with pytest.raises(FloatingPointError, match='at step 0, .*No state was saved before'): train(tmp_path/'a', explodes)
    with pytest.raises(FloatingPointError, match='gradient norm nan at step 5'): train(tmp_path/'b', at_steps(lambda step: step==5))  # the loss itself is finite

def fp16_on_cpu(monkeypatch):
    "accelerate's own path through a real loss scale, which it otherwise takes on a GPU only."
    import mem_nb.train as t
    from contextlib import nullcontext
    class Half(t.Accelerator):
        ready = False
        mixed_precision = property(lambda self: 'fp16' if self.ready else 'no')
        def autocast(self): return nullcontext()
    def make(run):
        acc = Half(cpu=True)
        acc.scaler,acc.native_amp,acc.ready = torch.amp.GradScaler('cpu', init_scale=2.**16),True,True
        return acc
    monkeypatch.setattr(t, 'make_accelerator', make)

def test_fp16_skips_a_few_infinite_gradients(tmp_path, monkeypatch):
    fp16_on_cpu(monkeypatch)
    model,m = train(tmp_path, at_steps(lambda step: step in (5,6,20)))
    assert np.isfinite(m['loss']) and m['loss'] < read_log(tmp_path)[0]['loss']
    assert all(p.isfinite().all() for p in model.parameters())

def test_fp16_stops_when_the_gradient_stays_infinite(tmp_path, monkeypatch):
    "2**16 is halved sixteen times until nothing is scaled up any more."
    fp16_on_cpu(monkeypatch)
    with pytest.raises(FloatingPointError, match='loss scale 1 .*at step 26, .*state of step 21 is kept'): train(tmp_path, at_steps(lambda step: step>=10))
    assert all(v.isfinite().all() for v in torch.load(tmp_path/'last'/'state.pt', weights_only=True)['model'].values())

def test_fp16_stops_at_a_loss_that_is_no_number(tmp_path, monkeypatch):
    fp16_on_cpu(monkeypatch)
    def explodes(model, batch, step, generator): return loss_fn(model, batch, step, generator)[0]*(float('inf') if step==9 else 1), {}
    with pytest.raises(FloatingPointError, match='loss inf, .*loss scale .*at step 9, learning rate'): train(tmp_path, explodes)

def test_a_state_that_would_run_code_is_refused(tmp_path):
    import os
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'harm'),)
    (tmp_path/'last').mkdir(); torch.save({'settings':Evil()}, tmp_path/'last'/'state.pt')
    with pytest.raises(ValueError, match='is no readable training state'): train(tmp_path)
    assert not (tmp_path/'harm').exists()

def test_atomic_leaves_nothing_half_written(tmp_path):
    (tmp_path/'a').write_text('old')
    with pytest.raises(RuntimeError):
        with atomic(tmp_path/'a') as tmp: tmp.write_text('half'); raise RuntimeError
    assert (tmp_path/'a').read_text()=='old' and [p.name for p in tmp_path.iterdir()]==['a']

def test_what_a_kill_left_half_written_is_removed_by_the_next_session(tmp_path):
    left = [tmp_path/'last'/'state.pt.123.tmp', tmp_path/'best.safetensors.123.tmp']
    (tmp_path/'last').mkdir()
    for f in left: f.write_text('half')
    train(tmp_path, steps=8)
    assert not list(tmp_path.rglob('*.tmp')) and (tmp_path/'final.safetensors').is_file()

def test_weights_name_what_does_not_fit(tmp_path):
    save_weights(nn.Linear(2,3), tmp_path/'w.safetensors')
    with pytest.raises(ValueError, match='missing: 0.bias, 0.weight; extra: bias, weight'): load_weights(nn.Sequential(nn.Linear(2,3)), tmp_path/'w.safetensors')
    (tmp_path/'w.safetensors').write_bytes(b'rubbish')
    with pytest.raises(ValueError, match='no readable file of weights'): load_weights(nn.Linear(2,3), tmp_path/'w.safetensors')

def test_defect_14_ema_starts_warm(tmp_path):
    model,_ = train(tmp_path, steps=60, ema_decay=.9999)
    start = train(tmp_path/'x', steps=1)[0]
    ema = load_weights(nn.Sequential(nn.Linear(4,16), nn.Dropout(.1), nn.ReLU(), nn.Linear(16,1)), tmp_path/'final.safetensors')
    moved = lambda m: (m[0].weight-start[0].weight).norm().item()
    assert moved(ema) > .5*moved(model)   # a constant 0.9999 would have moved by less than a hundredth

def test_step_randomness_depends_on_seed_step_and_rank_only():
    draw = lambda *a: torch.rand(4, generator=step_generator(*a)).tolist()
    alone = lambda *a: (step_generator(*a), torch.rand(4).tolist())[1]
    assert draw(0,3)==draw(0,3,1) and len({tuple(draw(*a)) for a in [(0,3),(0,4),(1,3)]})==3      # what processes draw together
    assert alone(0,3)==alone(0,3) and len({tuple(alone(*a)) for a in [(0,3),(0,4),(1,3),(0,3,1)]})==4

def test_settings_leave_out_what_does_not_decide():
    keys = step_settings(Config(), 'data', 'pretrain')
    assert 'pt_lr' in keys and 'input_H' in keys and 'data_path' not in keys and 'vae_lr' not in keys

def test_log_line_cut_off_by_a_crash_is_left_out(tmp_path):
    (tmp_path/'log.jsonl').write_text('{"step": 1}\n{"ste')
    assert read_log(tmp_path)==[{'step':1}]

def test_half_precision_on_cpu_trains(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4,1)
    m = Trainer(model, loss_fn, batches, 60, tmp_path, torch.optim.AdamW(model.parameters(), weight_decay=0), lambda k: 5e-2, RunConfig(device='cpu', precision='bf16')).fit()
    assert m['loss'] < read_log(tmp_path)[0]['loss']

def wandb_records(file):
    "What an offline run of wandb has written down: pieces of protobuf records, in blocks of 32 KB."
    import struct
    from wandb.proto.wandb_internal_pb2 import Record
    raw,at,piece,found = file.read_bytes(),7,b'',[]
    while at+7<=len(raw):
        if 0<-at%2**15<7: at += -at%2**15; continue          # too short for a header: padding
        _,size,kind = struct.unpack_from('<IHB', raw, at)
        piece,at = piece+raw[at+7:at+7+size],at+7+size
        if kind in (1,4): found.append(Record.FromString(piece)); piece = b''
    return found

def test_wandb_logs_offline_without_a_login_and_continues_its_run(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    monkeypatch.setenv('WANDB_MODE', 'offline'); monkeypatch.setenv('WANDB_SILENT', 'true')
    def draw(model): fig,ax = plt.subplots(figsize=(1,1)); ax.plot([1,2]); return {'strip':fig}
    def run(loss_fn):
        torch.manual_seed(0)
        model = nn.Linear(4,1)
        fit(model, loss_fn, batches, 12, tmp_path/'pretrain', torch.optim.AdamW(model.parameters()), lambda k: 1e-3,
            RunConfig(device='cpu', log_every=4, wandb=True), validate=lambda m: {'x':1.}, validate_every=6, save_every=5, media=draw)
    def dies(model, batch, step, generator):
        if step==8: raise KeyboardInterrupt
        return loss_fn(model, batch, step, generator)
    with pytest.raises(KeyboardInterrupt): run(dies)
    __import__('wandb').finish()                 # as the end of the process would
    run(loss_fn)
    assert (tmp_path/'pretrain'/'media'/'strip.png').exists() and read_log(tmp_path/'pretrain')[-1]['val_x']==1.
    parts = [wandb_records(f) for f in sorted((tmp_path/'pretrain').rglob('*.wandb'), key=lambda f: f.stat().st_mtime)]
    assert len(parts)==2 and len({r.run.run_id for part in parts for r in part if r.run.run_id})==1      # two pieces of one run: both can be synced
    keys = {item.key or item.nested_key[0] for part in parts for r in part for item in r.history.item}
    assert {'loss','lr','images_s','grad_norm','val_x','strip'} <= keys

def test_a_log_without_a_bar_says_how_far_it_is(tmp_path, capsys):
    train(tmp_path, steps=8)        # TQDM_DISABLE is set for all tests
    lines = [l for l in capsys.readouterr().out.splitlines() if l]
    assert len(lines)==1 and lines[0].startswith('train: step 8 of 8, 0:00:00 left; loss ')

def test_a_signal_in_the_last_step_finishes_and_stops_before_what_comes_next(tmp_path):
    import signal
    from mem_nb.config import Stopped
    def last(model, batch, step, generator):
        if step==39: signal.raise_signal(signal.SIGTERM)
        return loss_fn(model, batch, step, generator)
    with pytest.raises(Stopped, match='train: finished, and asked to stop'): train(tmp_path/'a', last)
    _,again = train(tmp_path/'a')              # answers at once
    _,whole = train(tmp_path/'b')
    assert again['loss']==whole['loss'] and again['step']==40

def test_a_damaged_state_never_takes_the_place_of_a_sound_one(tmp_path, monkeypatch):
    "Killed at the very save after the damage was found."
    class Killed(BaseException): pass
    def stop_at(n):
        def loss(model, batch, step, generator):
            if step==n: raise Killed
            return loss_fn(model, batch, step, generator)
        return loss
    _,whole = train(tmp_path/'whole')
    with pytest.raises(Killed): train(tmp_path/'a', stop_at(25))                # states of steps 14 and 21 lie there
    last = tmp_path/'a'/'last'
    good = (last/'before.pt').read_bytes()
    with open(last/'state.pt', 'r+b') as f: f.seek(-400, 2); f.write(b'rubbish'*20)
    replace = os.replace
    def die(a, b):
        replace(a, b)
        if 'before' in str(b): raise Killed                                    # between the two renames of a save
    monkeypatch.setattr('mem_nb.state.os.replace', die)
    with pytest.warns(UserWarning, match='going on from the state before it'):
        try: train(tmp_path/'a', stop_at(33))
        except Killed: pass
    monkeypatch.undo()
    _,again = train(tmp_path/'a')
    assert again['loss']==whole['loss'] and (tmp_path/'a'/'final.safetensors').read_bytes()==(tmp_path/'whole'/'final.safetensors').read_bytes()
    assert len(good)>0 and not last.exists()

def test_weights_are_kept_along_the_way_and_change_nothing(tmp_path):
    run = RunConfig(device='cpu', log_every=4, snapshots=4)
    def train_so(folder, run, loss_fn=loss_fn):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        fit(model, loss_fn, batches, 40, folder, torch.optim.AdamW(model.parameters()), lambda k: 1e-2, run, save_every=7)
    train_so(tmp_path/'a', run); train_so(tmp_path/'b', replace(run, snapshots=0))
    kept = sorted(p.name for p in (tmp_path/'a'/'steps').iterdir())
    assert kept==['0000010.safetensors','0000020.safetensors','0000030.safetensors'] and not (tmp_path/'b'/'steps').exists()
    assert (tmp_path/'a'/'final.safetensors').read_bytes()==(tmp_path/'b'/'final.safetensors').read_bytes()
    def dies(model, batch, step, generator):
        if step==23: raise KeyboardInterrupt
        return loss_fn(model, batch, step, generator)
    with pytest.raises(KeyboardInterrupt): train_so(tmp_path/'c', run, dies)
    train_so(tmp_path/'c', run)
    for name in kept: assert (tmp_path/'a'/'steps'/name).read_bytes()==(tmp_path/'c'/'steps'/name).read_bytes(), name
    assert len({(tmp_path/'a'/'steps'/name).read_bytes() for name in kept})==3

def test_what_a_kill_at_the_very_end_left_is_tidied(tmp_path):
    train(tmp_path)
    (tmp_path/'last').mkdir(); (tmp_path/'last'/'state.pt').write_bytes(b'large')
    train(tmp_path)
    assert not (tmp_path/'last').exists()

def test_a_damaged_line_of_a_log_is_said_and_costs_itself_only(tmp_path):
    (tmp_path/'log.jsonl').write_text('{"step": 1}\n{"st\x00\n{"step": 3}\n{"step": 4')
    with pytest.warns(UserWarning, match='line 2 is damaged'): assert [r['step'] for r in read_log(tmp_path)]==[1,3]

def test_a_damaged_state_is_named(tmp_path):
    (tmp_path/'last').mkdir(); (tmp_path/'last'/'state.pt').write_text('rubbish')
    with pytest.raises(ValueError, match='state.pt is no readable training state.*remove'): train(tmp_path)

def test_full_disk_is_one_sentence_whoever_noticed(tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10**9, 10**9, 100))
    with pytest.raises(OSError, match='disk is full, .*state.pt was not written'):
        with atomic(tmp_path/'state.pt') as tmp: tmp.write_text('half'); raise RuntimeError('enforce fail at inline_container.cc')
    assert not list(tmp_path.iterdir())

# ---- speed
def test_without_a_compiler_training_goes_on(monkeypatch, capsys):
    monkeypatch.setenv('PATH', ''); monkeypatch.delenv('CXX', raising=False)
    model = nn.Linear(2, 2)
    assert not compile_model(model) and 'no C compiler' in capsys.readouterr().out and model._compiled_call_impl is None

def test_a_compiled_model_keeps_the_names_of_its_weights(monkeypatch):
    monkeypatch.setattr('mem_nb.speed.shutil.which', lambda name: name)   # compiling itself waits for the first call
    model = nn.Linear(2, 2)
    names = list(model.state_dict())
    assert compile_model(model) and list(model.state_dict())==names and model._compiled_call_impl is not None
    assert list(deepcopy(model).state_dict())==names

def test_changed_settings_go_on_where_that_is_allowed(tmp_path, capsys):
    def dies(model, batch, step, generator):
        if step==20: raise KeyboardInterrupt
        return loss_fn(model, batch, step, generator)
    def train(folder, loss_fn=loss_fn, steps=40, decay=.01, allow=False, settings=None):
        torch.manual_seed(0)
        model = nn.Linear(4,1)
        fit(model, loss_fn, batches, steps, folder, opt := torch.optim.AdamW(model.parameters(), weight_decay=decay), lambda k: 1e-2,
            RunConfig(device='cpu', log_every=4, allow_changes=allow), settings or {'pt_weight_decay':decay}, save_every=7)
        return model,opt.param_groups[0]['weight_decay']
    with pytest.raises(KeyboardInterrupt): train(tmp_path/'a', dies)
    with pytest.raises(ValueError, match='pt_weight_decay was 0.01, is now 0.5.*allow_changes = 1'): train(tmp_path/'a', decay=.5)
    with pytest.raises(ValueError, match='of step 14, these settings end at 10'): train(tmp_path/'a', steps=10, allow=True)
    changed,used = train(tmp_path/'a', decay=.5, allow=True)
    assert 'pt_weight_decay was 0.01, is now 0.5. allow_changes = 1' in capsys.readouterr().out
    assert used==.5 and changed.weight.norm() < train(tmp_path/'b')[0].weight.norm()       # the new one acts
    assert json.loads((tmp_path/'a'/'final.json').read_text())['settings']=={'pt_weight_decay':.5}
    train(tmp_path/'a', decay=.1, allow=True)                                              # finished: stays as it is
    assert 'what is finished stays' in capsys.readouterr().out

def test_kept_memory_changes_no_number_and_spares_page_faults():
    import platform, subprocess, sys
    if platform.libc_ver()[0]!='glibc': pytest.skip('keep_memory is for glibc')
    child = """if 1:
        import json, resource, sys, torch
        from mem_nb.speed import keep_memory
        if sys.argv[1]=='1': assert keep_memory()
        torch.set_num_threads(1); torch.manual_seed(0)
        layer,x,faults = torch.nn.Linear(64, 2048),torch.randn(1024, 64),lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for k in range(30):
            if k==10: before = faults()
            layer.zero_grad(); torch.nn.functional.gelu(layer(x)).square().mean().backward()
        print(json.dumps([faults()-before, layer.weight.grad.sum().item()]))"""
    given,kept = (json.loads(subprocess.run([sys.executable, '-c', child, flag], capture_output=True, text=True, check=True).stdout) for flag in '01')
    assert kept[1]==given[1] and kept[0] < given[0]/2
