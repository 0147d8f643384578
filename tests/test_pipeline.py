"The whole way, as a user goes it: the command line, and kill -9 in the middle of every training step."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from conftest import TINY
from mem_nb.config import load_config
from mem_nb.datasets import store_path
from mem_nb.events import make_events
from mem_nb.finetune import pretrained_path, pretraining_store
from mem_nb.pipeline import STEPS, command, steps_of
from mem_nb.state import weights_hash

MEM_NB = ['-c', 'from mem_nb.pipeline import main; main()']
KILL = '''
import os, signal, sys
import mem_nb.train as train
step, at, where = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def die(): os.kill(os.getpid(), signal.SIGKILL)
def in_this_step(folder): return step in str(folder)
if where=='update':                      # after the gradients, before the weights have moved
    original = train.train_step
    def train_step(acc, state, *args):
        if state.step==at and in_this_step(state.folder_for_test): state.optimizer.step = die
        return original(acc, state, *args)
    train.train_step = train_step
    start = train.Trainer._start
    def _start(self): start(self); self.state.folder_for_test = self.folder
    train.Trainer._start = _start
else:                                    # while the state is being written
    save = train.TrainingState.save
    def half(self, path, settings):
        if self.step>=at and in_this_step(path):
            path.with_name(path.name+'.0.tmp').write_bytes(b'half'); die()
        save(self, path, settings)
    train.TrainingState.save = half
from mem_nb.pipeline import command
command('run', sys.argv[4])
'''

def conf(folder):
    (folder/'x.conf').write_text(TINY + f'\nruns_dir = {folder}/runs\ndata_path = {folder.parent}/digits\nexpweek =\nexpname = tiny\n')
    return str(folder/'x.conf')

def python(*args):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=dict(os.environ, TQDM_DISABLE='1', MPLBACKEND='agg', OMP_NUM_THREADS='1'))

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An unbroken run, in a process of its own, as the command line gives it."
    folder = tmp_path_factory.mktemp('pipeline')/'whole'; folder.mkdir()
    done = python(*MEM_NB, 'run', conf(folder))
    assert done.returncode==0, done.stderr[-3000:]
    return folder,done

def test_run_goes_from_recordings_to_a_report(whole):
    folder,done = whole
    run = folder/'runs'/'tiny'
    assert 'results:' in done.stdout
    summary = json.loads((run/'summary.json').read_text())
    assert summary['splits']['split_hash'] in (run/'report.html').read_text()
    assert {p.name for p in (run/'finetune').iterdir()}=={'pretrained_40_seed0','scratch_40_seed0'}
    assert not list(run.rglob('last')) and not list(run.rglob('*.tmp'))

def test_labels_that_cannot_be_are_told_before_anything_is_trained(tmp_path):
    (folder := tmp_path/'early').mkdir()
    with pytest.raises(ValueError, match='999 recordings of each class'): command('run', conf(folder), ['class_labels=999/class'])
    assert not (folder/'runs'/'tiny'/'tokenizer').exists() and not (folder/'runs'/'tiny'/'pretrain').exists()
    assert 'finetune' in (folder/'runs'/'tiny'/'failed.txt').read_text()

def test_a_step_alone_warns_of_them_and_a_chain_of_jobs_ends_with_its_first(tmp_path):
    (folder := tmp_path/'early').mkdir()
    wrong = ['class_labels=999/class', 'vae_epochs=1']
    with pytest.warns(UserWarning, match='finetune will refuse this: .*999 recordings of each class'): command('tokenizer', conf(folder), wrong)
    assert (folder/'runs'/'tiny'/'tokenizer'/'final.safetensors').exists() and not (folder/'runs'/'tiny'/'failed.txt').exists()
    with pytest.raises(ValueError, match='999 recordings of each class'): command('prepare', conf(folder), [*wrong, 'slurm_chain=1'])

SIGNALLED = """
import os, signal, sys
import mem_nb.evaluate, mem_nb.pack
def sent(function):
    def first(*args, **kwargs):
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        return function(*args, **kwargs)
    return first
module,name = sys.argv[1].split('.')
place = getattr(mem_nb, module)
setattr(place, name, sent(getattr(place, name)))
from mem_nb.pipeline import main
main(['run', sys.argv[3]])
"""

@pytest.mark.parametrize('where,name', [('pack.pack_source','SIGTERM'), ('evaluate.evaluate','SIGUSR1')])
def test_a_signal_outside_of_a_training_ends_with_status_75_and_the_same_command_continues(whole, tmp_path, where, name):
    folder,_ = whole
    shutil.copytree(folder/'runs', tmp_path/'runs')
    if where.startswith('pack'): shutil.rmtree(tmp_path/'runs'/'stores')
    (tmp_path/'x.conf').write_text((folder/'x.conf').read_text().replace(str(folder/'runs'), str(tmp_path/'runs')))
    done = python('-c', SIGNALLED, where, name, str(tmp_path/'x.conf'))
    assert done.returncode==75 and 'asked to stop; what is done is kept, and the same command continues' in done.stdout, done.stderr[-2000:]
    assert not (tmp_path/'runs'/'tiny'/'failed.txt').exists()
    done = python(*MEM_NB, 'run', str(tmp_path/'x.conf'))
    assert done.returncode==0, done.stderr[-2000:]
    assert (tmp_path/'runs'/'tiny'/'finetune'/'scratch_40_seed0'/'final.safetensors').exists()

@pytest.mark.skipif(not Path('/proc/self/task').is_dir(), reason='needs /proc')
@pytest.mark.parametrize('name', ['SIGUSR1','SIGTERM'])
def test_a_signal_to_prepare_and_its_workers_loses_no_recording(tmp_path, name):
    "What SLURM does before it takes a machine back: the whole group hears it."
    rng,n = np.random.default_rng(0),200_000
    for k in range(24):
        (folder := tmp_path/'npy'/'ab'[k%2]).mkdir(parents=True, exist_ok=True)
        np.save(folder/f'{k:03}.npy', make_events(rng.integers(0, 640, n), rng.integers(0, 480, n), np.sort(rng.integers(0, 10**6, n)), rng.integers(0, 2, n)))
    def words(where): return [*MEM_NB, 'prepare', str(tmp_path/'x.conf'), f'store_path={tmp_path/where}', f'expname={where}']
    (tmp_path/'x.conf').write_text(f'data_set = npy\ndata_path = {tmp_path}/npy\nprepare_workers = 2\nruns_dir = {tmp_path}/runs\nexpweek =\n')
    assert python(*words('whole')).returncode==0
    ended = []
    for pause in (0,.05,.1,.2,None):
        p = subprocess.Popen([sys.executable, *words('broken')], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=dict(os.environ, TQDM_DISABLE='1'))
        if pause is not None:
            workers = Path(f'/proc/{p.pid}/task/{p.pid}/children')
            while p.poll() is None and not workers.read_text(): time.sleep(.01)
            time.sleep(pause)
            if p.poll() is None: os.killpg(p.pid, getattr(signal, name))
        said = p.communicate()[0]
        assert p.returncode in (0,75) or 'prepare: ' in said, said       # or it was on its way out
        ended.append(p.returncode)
    assert 75 in ended and ended[-1]==0
    whole,broken = (json.loads((tmp_path/where/'manifest.json').read_text()) for where in ('whole','broken'))
    assert broken['recordings']==24 and not broken['refused'] and broken['data_hash']==whole['data_hash']

def test_kill_9_in_every_training_step_ends_bit_equal(whole, tmp_path_factory):
    folder,_ = whole
    broken = folder.parent/'broken'; broken.mkdir(); x = conf(broken)
    for step,at,where in [('tokenizer',9,'update'), ('tokenizer',12,'save'), ('pretrain',8,'update'), ('pretrain',12,'save'), ('finetune',8,'update'), ('scratch',15,'update')]:
        killed = python('-c', KILL, step, str(at), where, x)
        assert killed.returncode==-signal.SIGKILL, (step, killed.stdout[-2000:], killed.stderr[-2000:])
        assert not list((broken/'runs'/'tiny').glob(f'{step}/final.safetensors'))
        assert list((broken/'runs'/'tiny').rglob('last/state.pt')), step
    assert python(*MEM_NB, 'run', x).returncode==0
    finals = sorted(p.relative_to(folder/'runs') for p in (folder/'runs'/'tiny').rglob('final.safetensors'))
    assert len(finals)==4
    for p in finals: assert (folder/'runs'/p).read_bytes()==(broken/'runs'/p).read_bytes(), p

def test_finished_run_with_another_setting_is_refused(whole):
    folder,_ = whole
    before = (folder/'runs'/'tiny'/'run.conf').read_text()
    with pytest.raises(ValueError, match='pt_lr was 0.002, is now 0.1.*another expname'): command('run', conf(folder), ['pt_lr=0.1'])
    assert (folder/'runs'/'tiny'/'run.conf').read_text()==before

def test_other_weights_to_start_from_are_another_result(whole):
    folder,_ = whole
    other = folder/'runs'/'tiny'/'finetune'/'scratch_40_seed0'/'final.safetensors'
    with pytest.raises(ValueError, match='start_hash was'): command('finetune', conf(folder), [f'class_checkpoint={other}'])

def test_a_run_is_a_start_by_its_folder_and_what_it_saw_is_known(whole):
    folder,_ = whole
    start = folder/'runs'/'tiny'
    same = [load_config(conf(folder), [f'class_checkpoint={p}']) for p in (start, start/'pretrain', start/'pretrain'/'final.safetensors')]
    assert len({pretrained_path(c) for c in same})==1 and {pretraining_store(c) for c in same}=={store_path(same[0])}
    assert len({weights_hash(c.finetune.checkpoint) for c in same})==1

def test_weights_that_are_not_there_are_missed_before_the_pretraining(whole):
    folder,_ = whole
    with pytest.raises(FileNotFoundError, match='nowhere'): command('run', conf(folder), ['expname=missing', 'class_checkpoint=nowhere'])
    assert not (folder/'runs'/'missing'/'tokenizer').exists()
    assert weights_hash('')==''

def test_mistakes_at_the_command_line_are_one_sentence(tmp_path):
    for args,said in [(['pretran','x.conf'], 'unknown step'), (['run','nowhere.conf'], 'no configuration file'), (['run','configs/demo.conf','pt_epoch=1'], "did you mean 'pt_epochs'")]:
        done = python(*MEM_NB, *args)
        assert done.returncode==1 and said in done.stderr and 'Traceback' not in done.stderr

def test_pretrain_without_its_tokenizer_says_so(tmp_path):
    (tmp_path/'x.conf').write_text(TINY + f'\nruns_dir = {tmp_path}\ndata_path = {tmp_path}/digits')
    with pytest.raises((FileNotFoundError, ValueError), match='tokenizer'): command('pretrain', str(tmp_path/'x.conf'))

def test_help_teaches_and_needs_no_heavy_import():
    done = python('-X', 'importtime', *MEM_NB, '--help')
    assert done.returncode==0 and all(s in done.stdout for s in STEPS) and 'pt_lr=1e-3' in done.stdout
    assert ' torch\n' not in done.stderr and ' timm\n' not in done.stderr

def test_each_look_inside_is_a_call_on_the_folder_of_a_run(whole):
    import matplotlib.pyplot as plt
    from mem_nb.inside import run_attention, run_bias, run_neighbours, run_strip
    run = whole[0]/'runs'/'tiny'
    for look in (run_attention, run_bias, run_neighbours, run_strip):
        assert look(run).axes; plt.close('all')
    with pytest.raises(ValueError, match='sample = 99 should lie in'): run_attention(run, 99)
    with pytest.raises(FileNotFoundError, match='no run.conf'): run_bias(run.parent)
