"""What becomes of a job: on a real SLURM of two nodes, with a training that only counts, and at the end with the real one."""
import hashlib, json, re, sys, time
from pathlib import Path
import pytest
import slurm_cluster
from conftest import TINY
from mem_nb.config import Stopped, parse_config
from mem_nb.datasets import prepared, store_path
from mem_nb.pipeline import command, watch
from mem_nb.slurm import job_options, job_states, live_jobs, noted_jobs, submit_chain, submit_parts, submit_step, write_job
from mem_nb.status import current, run_status
from mem_nb.sweep import elements, submit_sweep

HERE = Path(__file__).parent
STEPS = ['pretrain']
SMALL = 'gpu_num = 0\nslurm_cpus_per_task = 1\nslurm_mem = 1G\nslurm_time = 20\nexpweek =\n'

# ---- without a scheduler
def test_the_published_keys_become_the_options_of_the_original():
    text = 'slurm_job_name = ncars\nslurm_nodes = 1\ngpu_num = 2\ngpu_vram = 48G\nslurm_mem = 48G\nslurm_time = 3-00:00:00\nslurm_mail_type = None\nslurm_exclude = node1'
    options = job_options(parse_config(text).slurm, Path('r'))
    assert {'--gres=gpu:2,VRAM:48G','--mem=48G','--time=3-00:00:00','--exclude=node1','--ntasks-per-node=2','--job-name=ncars'} <= set(options)
    assert not any('mail' in o for o in options)

def test_options_of_a_site_pass_through_as_they_are():
    options = job_options(parse_config('slurm_options = --constraint="a100&ib" -A lab --comment="two words"').slurm, Path('r'))
    assert options[-3:]==['--constraint="a100&ib"', '-A lab', '--comment="two words"']

def test_a_later_submission_leaves_the_files_of_a_queued_one(tmp_path):
    a = write_job(parse_config('seed = 1', [f'runs_dir={tmp_path}']), 'run')
    text = a.read_text()
    b = write_job(parse_config('seed = 2', [f'runs_dir={tmp_path}']), 'run')
    assert a!=b and a.read_text()==text
    confs = {re.search(r'^conf=(\S+)', p.read_text(), re.M)[1] for p in (a,b)}
    assert len(confs)==2 and all(Path(c).is_file() for c in confs)
    assert {parse_config(Path(c).read_text()).run.seed for c in confs}=={1,2}

def test_the_warning_before_the_time_limit_can_be_longer():
    assert '--signal=USR1@90' in job_options(parse_config('').slurm, Path('r')) and '--signal=USR1@600' in job_options(parse_config('slurm_warn_s = 600').slurm, Path('r'))
    with pytest.raises(ValueError, match='slurm_warn_s'): parse_config('slurm_warn_s = 0')

def test_a_torn_line_of_one_run_does_not_hide_the_others(tmp_path):
    (tmp_path/'run'/'slurm').mkdir(parents=True)
    (tmp_path/'run'/'slurm'/'jobs.jsonl').write_text('{"job": "7", "step": "pretrain", "ti\n{"job": "8", "step": "pretrain", "time": 1}\n17\n')
    (tmp_path/'run'/'slurm'/'history.jsonl').write_text('{"time": 1, "job": "8", "event": "start", "code": 0}\n{"time": 2, "job": "8", "ev')
    assert [j['job'] for j in noted_jobs(tmp_path/'run')]==['8'] and run_status(tmp_path/'run', STEPS, 1, None)['state']=='running'

def test_packing_that_ended_is_not_new(tmp_path):
    (tmp_path/'run'/'slurm').mkdir(parents=True)
    (tmp_path/'run'/'slurm'/'jobs.jsonl').write_text('{"job": "8", "step": "prepare", "time": 1}\n')
    assert run_status(tmp_path/'run', ['prepare','tokenizer'], 1, {})['state']!='ended'
    (tmp_path/'run'/'slurm'/'history.jsonl').write_text('{"time": 1, "job": "8", "event": "start", "code": 0}\n{"time": 2, "job": "8", "event": "done", "code": 0}\n')
    assert [run_status(tmp_path/'run', ['prepare','tokenizer'], 1, {})[k] for k in ('state','step')]==['ended','prepare']

def test_without_slurm_one_sentence_says_so(tmp_path, monkeypatch):
    (tmp_path/'x.conf').write_text(SMALL)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(OSError, match='there is no sbatch on this machine.*--dry-run'): command('run', str(tmp_path/'x.conf'), [f'runs_dir={tmp_path}'], slurm=True)
    command('run', str(tmp_path/'x.conf'), [f'runs_dir={tmp_path}'], slurm=True, dry_run=True)
    with pytest.raises(ValueError, match='no SLURM'): watch('cancel', str(tmp_path/'run'))

def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path/'file').write_text('')
    for where in (tmp_path/'file', '/proc/nowhere'):   # root may write into folders that are read-only
        with pytest.raises(OSError, match='cannot write into the run folder'): write_job(parse_config('', [f'runs_dir={where}']), 'run')

def test_a_sweep_here_names_what_fails_and_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path/'x.conf').write_text(f'runs_dir = {tmp_path}\nexpweek =\nexpname = some\n')
    def pretend(cfg):
        if cfg.run.seed==1: raise FloatingPointError('loss nan at step 3')
        cfg.folder.mkdir()
        (cfg.folder/'summary.json').write_text(json.dumps(dict(results=[dict(method='svm', n_labels=50, accuracy=.5+cfg.run.seed/10)])))
    monkeypatch.setattr('mem_nb.pipeline.run', pretend)
    with pytest.raises(ValueError, match='1 of 3 failed: some-seed_1'): command('sweep', str(tmp_path/'x.conf'), ['seed=0,1,2'])
    said = capsys.readouterr().out
    assert 'some-seed_1: FloatingPointError: loss nan at step 3' in said
    assert re.search(r'svm +50 +2 +0.6000', said) and (tmp_path/'some-sweep'/'table.csv').is_file()

def test_an_interruption_ends_a_sweep(tmp_path, monkeypatch):
    (tmp_path/'x.conf').write_text(f'runs_dir = {tmp_path}\nexpweek =\n')
    begun = []
    def stopped(cfg): begun.append(cfg.run.seed); raise Stopped('asked to stop at step 3')
    monkeypatch.setattr('mem_nb.pipeline.run', stopped)
    with pytest.raises(Stopped): command('sweep', str(tmp_path/'x.conf'), ['seed=0,1'])
    assert begun==[0]

def test_a_failed_step_leaves_its_last_words(tmp_path):
    (tmp_path/'x.conf').write_text(f'runs_dir = {tmp_path}\nexpweek =\ndata_path = {tmp_path}/nowhere')
    with pytest.raises(OSError): command('prepare', str(tmp_path/'x.conf'))
    status = run_status(tmp_path/'run', ['prepare','tokenizer'])
    assert status['state']=='failed' and 'nowhere' in status['why']

def test_a_training_that_has_begun_and_not_logged_is_not_taken_for_packing(tmp_path):
    assert current(tmp_path, ['prepare','pretrain'])[0]=='prepare'
    (tmp_path/'pretrain').mkdir(); (tmp_path/'pretrain'/'log.jsonl').touch()          # as `fit` does at its start
    assert current(tmp_path, ['prepare','pretrain'])[0]=='pretrain'

# ---- with one
@pytest.fixture(scope='session')
def cluster():
    "A SLURM of two nodes; the environment of this process reaches it."
    if why := slurm_cluster.absent(): pytest.skip(why)
    with slurm_cluster.cluster() as c, pytest.MonkeyPatch.context() as m:
        for k in ('SLURM_CONF','PATH'): m.setenv(k, c.env[k])
        yield c

class Job:
    "A submitted job of a run in a folder of its own."
    def __init__(self, cluster, folder, text='', step='pretrain', base='', **plan):
        self.cluster,self.folder,self.step = cluster,folder/'run',step
        self.cfg = parse_config(base + SMALL + f"slurm_setup = export MASTER_ADDR=127.0.0.1\nslurm_container = {sys.executable} {HERE/'standin.py'}", [f'runs_dir={folder}', *text.splitlines()])
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder/'plan.json').write_text(json.dumps(plan))
        self.submit()
    def submit(self): self.id = submit_step(self.cfg, self.step)
    def state(self): return job_states([self.id]).get(self.id, ('',))[0]
    def at(self): return run_status(self.folder, [self.step])['at'] or 0
    def status(self): return run_status(self.folder, [self.step], 1, job_states([self.id]))
    def history(self): return [json.loads(l) for l in (self.folder/'slurm'/'history.jsonl').read_text().splitlines()]
    def events(self): return [e['event'] for e in self.history()]
    def log(self): return (self.folder/'slurm'/f'{self.id}.log').read_text()
    def wait(self, ready, what, seconds=60): return self.cluster.wait(ready, f'{what}; job {self.id} {self.state()}', seconds)
    def begun(self, step=3): self.wait(lambda: self.at()>=step, f'step {step}')
    def waiting(self): self.wait(lambda: self.state()=='PENDING', 'the job to be requeued')
    def again(self):
        "A requeued job waits two minutes, unless it is told not to."
        self.waiting()
        time.sleep(3)         # a start while the old one is being cleaned up is lost
        for _ in range(40):   # for some seconds it may still be cleaning up
            self.cluster.ask('scontrol', 'update', f'JobId={self.id}', 'StartTime=now')
            if self.state() not in ('PENDING',): return
            time.sleep(.5)
    def ended(self, seconds=60): self.wait(lambda: not self.state() and self.events()[-1:]!=['requeued'], 'the job to end', seconds)
    def results(self): return [(self.folder/'pretrain'/f'final{r}.txt').read_text() for r in range(self.cfg.slurm.nodes)]

def unbroken(steps, ranks=1):
    "What the stand-in ends with, whatever happened in between."
    found = []
    for rank in range(ranks):
        value = f'seed {rank}'
        for _ in range(steps): value = hashlib.sha256(value.encode()).hexdigest()
        found.append(value)
    return found

def test_two_nodes_to_the_end(cluster, tmp_path):
    job = Job(cluster, tmp_path, 'slurm_nodes = 2', steps=10, seconds=.05)
    job.ended()
    assert job.results()==unbroken(10, 2) and job.events()==['start','done']
    assert job.history()[0]['nodes']=='n[1-2]'
    assert job.status()['state']=='done'

def test_usr1_saves_requeues_and_continues(cluster, tmp_path):
    job = Job(cluster, tmp_path, 'slurm_nodes = 2', steps=60)
    job.begun(13)
    assert job.status()['state']=='running'
    cluster.ask('scancel', '--signal=USR1', job.id)
    job.again(); job.ended()
    assert job.events()==['start','requeued','start','done'] and job.results()==unbroken(60, 2)
    steps = [json.loads(l)['step'] for l in (job.folder/'pretrain'/'log.jsonl').read_text().splitlines()]
    assert steps==list(range(1,61))                              # no step was lost, none done twice
    assert len(re.findall('asked to stop at step', job.log()))==2

def test_preemption_by_a_higher_partition(cluster, tmp_path):
    low = Job(cluster, tmp_path/'low', 'slurm_nodes = 2\nslurm_options = --exclusive', steps=60)
    low.begun()
    high = Job(cluster, tmp_path/'high', 'slurm_nodes = 2\nslurm_partition = high\nslurm_options = --exclusive', steps=8)
    low.waiting(); high.ended()
    assert high.results()==unbroken(8, 2)
    low.again(); low.ended()
    assert low.events() in (['start','taken','start','done'], ['start','start','done']) and low.results()==unbroken(60, 2)
    steps = [json.loads(l)['step'] for l in (low.folder/'pretrain'/'log.jsonl').read_text().splitlines()]
    assert steps==list(range(1,61))                              # TERM was heard: the state of that very step was saved

def test_a_time_limit_is_survived(cluster, tmp_path):
    job = Job(cluster, tmp_path, steps=400)
    job.begun()
    cluster.ask('scontrol', 'update', f'JobId={job.id}', 'TimeLimit=1')   # less than 90 s left: USR1 at once
    job.waiting()
    assert job.status()['state']=='queued'
    cluster.ask('scontrol', 'update', f'JobId={job.id}', 'TimeLimit=20')
    (job.folder/'plan.json').write_text(json.dumps(dict(steps=400, seconds=.005)))
    job.again(); job.ended()
    assert job.events()==['start','requeued','start','done'] and job.results()==unbroken(400)

def test_what_was_cancelled_stays_so_and_can_be_taken_up(cluster, tmp_path, capsys):
    job = Job(cluster, tmp_path, steps=60)
    job.begun()
    with pytest.raises(ValueError, match=f'job {job.id} already works on'): submit_step(job.cfg, 'pretrain')
    watch('cancel', str(job.folder))
    job.ended()
    assert 'requeued' not in job.events() and job.status()['state']=='cancelled'
    reached = job.at()
    job.submit(); job.ended()
    assert job.results()==unbroken(60)
    steps = [json.loads(l)['step'] for l in (job.folder/'pretrain'/'log.jsonl').read_text().splitlines()]
    assert steps==list(range(1,61)) and reached<60               # cancelled, too, it saved first

def test_a_failure_ends_all_processes_and_is_not_requeued(cluster, tmp_path, capsys):
    job = Job(cluster, tmp_path, 'slurm_nodes = 2', steps=10_000, fail_at=5)
    job.ended(30)
    assert job.events()==['start','failed']
    status = job.status()
    assert status['state']=='failed' and 'mem_nb pretrain: loss nan at step 5' in status['why']
    watch('logs', str(job.folder), n=50)
    assert 'loss nan' in capsys.readouterr().out

def test_a_node_that_dies_costs_the_steps_since_the_last_save(cluster, tmp_path):
    job = Job(cluster, tmp_path, steps=120)
    job.begun(23)
    node = job.history()[0]['nodes']
    cluster.kill_node(node)
    try:
        job.wait(lambda: len(job.events())>1 or job.state()=='PENDING', 'the node to be given up', 60)
        job.again(); job.ended()
    finally:
        cluster.start_node(node)
        cluster.wait(cluster.idle, 'the node to come back')
    assert job.history()[-1]['nodes']!=node and job.results()==unbroken(120)
    steps = [json.loads(l)['step'] for l in (job.folder/'pretrain'/'log.jsonl').read_text().splitlines()]
    assert 120 <= len(steps) <= 130                              # saved every ten steps

def test_one_element_of_an_array_fails_and_the_others_do_not(cluster, tmp_path, capsys):
    (tmp_path/'x.conf').write_text(SMALL + f"runs_dir = {tmp_path}\nexpname = some\nslurm_container = {sys.executable} {HERE/'standin.py'}")
    found = elements([tmp_path/'x.conf'], ['seed=0,1,2'])
    for i,(cfg,_) in enumerate(found):
        cfg.folder.mkdir()
        (cfg.folder/'plan.json').write_text(json.dumps(dict(steps=6, fail_at=3 if i==1 else None)))
    submit_sweep(found)
    sweep = tmp_path/'some-sweep'
    cluster.wait(lambda: noted_jobs(sweep) and not live_jobs(sweep) and not any(live_jobs(cfg.folder) for cfg,_ in found), 'the array to end', 60)
    assert [run_status(cfg.folder, STEPS, 1, {})['state'] for cfg,_ in found]==['done','failed','done']
    with pytest.raises(FileNotFoundError, match='nowhere'): command('sweep', 'nowhere.conf', slurm=True)
    command('sweep', str(tmp_path/'x.conf'), ['seed=0,1,2'], table=True)
    assert 'some-seed_1: failed' in capsys.readouterr().out

def of_array(cluster, tmp_path, steps):
    "Two trainings in an array: its elements 1 and 2, the last; element 0 has nothing left to do, as the stand-in counts to its end where the real program packs."
    (tmp_path/'x.conf').write_text(SMALL + f"runs_dir = {tmp_path}\nexpname = some\nslurm_container = {sys.executable} {HERE/'standin.py'}")
    found = elements([tmp_path/'x.conf'], ['seed=0,1,2'])
    for k,(cfg,_) in enumerate(found): cfg.folder.mkdir(); (cfg.folder/'plan.json').write_text(json.dumps(dict(steps=steps if k else 1)))
    submit_sweep(found)
    at = lambda cfg: run_status(cfg.folder, STEPS, 1, {})['at'] or 0
    cluster.wait(lambda: all(at(cfg)>=3 for cfg,_ in found[1:]), 'both to begin', 60)
    return [cfg for cfg,_ in found[1:]],noted_jobs(tmp_path/'some-sweep')[-1]['job']

def events_of(cfg): return [json.loads(l)['event'] for l in (cfg.folder/'slurm'/'history.jsonl').read_text().splitlines()]

def test_every_element_of_an_array_saves_and_is_requeued_the_last_one_too(cluster, tmp_path):
    "The last element has the number of the whole array."
    found,array = of_array(cluster, tmp_path, 300)
    cluster.ask('scancel', '--signal=USR1', array)
    cluster.wait(lambda: all(events_of(cfg)[-1:]==['requeued'] for cfg in found), 'both to be requeued', 60)
    for cfg in found: (cfg.folder/'plan.json').write_text(json.dumps(dict(steps=300, seconds=.005)))
    time.sleep(3)
    def done():
        for k in (1,2): cluster.ask('scontrol', 'update', f'JobId={array}_{k}', 'StartTime=now')
        return all(events_of(cfg)[-1:]==['done'] for cfg in found)
    cluster.wait(done, 'both to end', 60)
    assert [events_of(cfg) for cfg in found]==[['start','requeued','start','done']]*2
    assert [(cfg.folder/'pretrain'/'final0.txt').read_text() for cfg in found]==unbroken(300)*2

def test_a_sweep_is_cancelled_as_a_whole(cluster, tmp_path, capsys):
    found,array = of_array(cluster, tmp_path, 10_000)
    assert array in live_jobs(tmp_path/'some-sweep') and job_states([array])[array][0]=='RUNNING'
    watch('cancel', str(tmp_path/'some-sweep'))
    cluster.wait(lambda: not any(live_jobs(cfg.folder) for cfg in found), 'both to end', 60)
    assert [run_status(cfg.folder, STEPS, 1, {})['state'] for cfg in found]==['cancelled']*2

@pytest.mark.parametrize('text,key', [('slurm_partition = nowhere','slurm_partition'), ('gpu_num = 1\ngpu_vram = 48G','gpu_vram'), ('slurm_mem = 900G','slurm_mem'),
                                      ('slurm_time = soon','slurm_time'), ('slurm_options = --frobnicate','slurm_options'), ('slurm_mail_type = never','slurm_mail_type')])
def test_what_slurm_refuses_is_told_in_its_words_with_the_key(cluster, tmp_path, text, key):
    with pytest.raises(ValueError, match=f'sbatch says: .*{key}.*Nothing was submitted'): Job(cluster, tmp_path, text)

def test_the_code_of_a_queued_job_is_that_of_its_submission(cluster, tmp_path):
    cfg = parse_config(TINY + SMALL, [f'runs_dir={tmp_path}', f'data_path={tmp_path}/digits', 'num_digits=60'])
    submit_step(cfg, 'prepare', dry_run=True)
    code, = (cfg.folder/'slurm').glob('code-*')
    (code/'mem_nb'/'pipeline.py').open('a').write('\nprint("this is the copy")\n')     # the copy is known by its name, and not made again
    submit_step(cfg, 'prepare')
    cluster.wait(lambda: not live_jobs(cfg.folder), 'the real program to prepare', 60)
    log = Path(noted_jobs(cfg.folder)[-1]['log']).read_text()
    assert 'this is the copy' in log and 'store ' in log, log

def test_files_are_packed_by_an_array_and_joined(cluster, tmp_path, digits):
    here,there = (parse_config(SMALL + f'data_set = folder\ndata_path = {digits}\nprepare_parts = 3', [f'runs_dir={tmp_path}/{n}']) for n in ('here','there'))
    submit_parts(there)
    cluster.wait(lambda: not live_jobs(there.folder), 'the parts to be packed and joined', 120)
    said = [Path(j['log']).read_text() for j in noted_jobs(there.folder)]
    assert [f'part {k} of 3' in said[k-1] for k in (1,2,3)]==[True]*3 and 'store ' in said[3], said
    one,other = prepared(here),store_path(there)
    for p in one.iterdir(): assert p.read_bytes().replace(b'/here', b'/there')==(other/p.name).read_bytes(), p.name
    assert not other.with_name(other.name+'.parts').exists()

@pytest.mark.parametrize('fail_at', [None, 3])
def test_the_steps_of_a_chain_wait_for_each_other(cluster, tmp_path, fail_at):
    cfg = parse_config(SMALL + f"expname = chained\nslurm_container = {sys.executable} {HERE/'standin.py'}", [f'runs_dir={tmp_path}'])
    cfg.folder.mkdir()
    (cfg.folder/'plan.json').write_text(json.dumps(dict(steps=6, fail_at=fail_at)))
    first,second = submit_chain(cfg, ['tokenizer','pretrain'])
    cluster.wait(lambda: not live_jobs(cfg.folder), 'the chain to end', 60)
    events = [(e['job'],e['event']) for e in map(json.loads, (cfg.folder/'slurm'/'history.jsonl').read_text().splitlines())]
    assert events==[(first,'start'),(first,'failed')] if fail_at else [(first,'start'),(first,'done'),(second,'start'),(second,'done')]
    assert run_status(cfg.folder, STEPS, 1, {})['state']==('failed' if fail_at else 'done')

def test_the_real_training_on_two_nodes_is_interrupted_and_ends_as_an_unbroken_one(cluster, tmp_path):
    (tmp_path/'broken').mkdir()
    text = 'slurm_nodes = 2\nslurm_container = \nslurm_setup = export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo\nvae_epochs = 8\nnum_digits = 60\nlog_every = 1\nsave_minutes = 60\nvae_save_ckpt_freq = 100'
    text += f'\ndata_path = {tmp_path}/digits\nstore_path = {tmp_path}/store'
    whole = Job(cluster, tmp_path/'whole', text, 'tokenizer', TINY); whole.ended(120)
    broken = Job(cluster, tmp_path/'broken', text, 'tokenizer', TINY); broken.begun(5)
    cluster.ask('scancel', '--signal=USR1', broken.id)
    broken.again(); broken.ended(120)
    assert broken.events()==['start','requeued','start','done'], broken.log()
    assert 'asked to stop at step' in broken.log()
    a,b = ((job.folder/'tokenizer'/'final.safetensors').read_bytes() for job in (whole,broken))
    assert a==b
