"What all benchmarks share: a record, the machine, and the file they are written to."
import json, os, platform, signal
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from datetime import date
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from time import perf_counter
from unittest.mock import patch
import torch
from tqdm import tqdm
from mem_nb.train import write_json

def record(
    name:str,             # what was measured
    value:float,          # what came out
    unit:str,             # of value, baseline and goal
    baseline:float=None,  # what it is compared with, measured in the same run where that can be
    goal:float=None,      # what it should reach
    better:str='higher',  # 'higher' or 'lower' values are better
) -> dict:                # {name, value, unit, baseline, ratio, goal, met}
    "One result; `ratio` says how many times better than the baseline, `met` whether the goal is reached."
    if better not in ('higher','lower'): raise ValueError(f"better = {better!r}; known: higher, lower")
    up = better=='higher'
    ratio = None if not baseline or not value else value/baseline if up else baseline/value
    met = None if goal is None else value>=goal if up else value<=goal
    return dict(name=name, value=value, unit=unit, baseline=baseline, ratio=ratio, goal=goal, met=met)

PLACES = {'data_path','runs_dir','expweek','expname'}   # settings that say where, not what

def asked(
    records:list,  # of a study
    words:list,    # settings of this run, KEY=VALUE
) -> list:
    "The records of the study itself; without their goals where this is a trial with other settings."
    trial = {w.split('=')[0].strip() for w in words} - PLACES
    return [r | dict(goal=None, met=None) for r in records] if trial else records

def cpu_model() -> str:
    "The processor's name, as far as the system tells."
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [l.split(':')[1].strip() for l in lines if l.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()

def num_cores() -> int:
    "Cores that this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()

def num_threads(jobs:int) -> int:
    "Threads that each of several tasks at once has."
    return max(1, num_cores()//jobs)

def machine(
    jobs:int=0,  # tasks at once, see `side_by_side`; 0: measured in this process
) -> dict:
    "What the numbers depend on."
    cores = num_cores()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(cpu=cpu_model(), cores=cores, threads=num_threads(jobs) if jobs else torch.get_num_threads(), gpu=gpu,
                python=platform.python_version(), torch=torch.__version__, date=date.today().isoformat())

def write(
    path:str|Path,  # JSON file
    records:list,   # from `record`
):
    "Write the list of records, atomically; the machine belongs beside the table in RESULTS.md."
    write_json(records, path)

def table(
    records:list,  # from `record`
) -> str:
    "The records as a Markdown table, for RESULTS.md."
    num = lambda x: '–' if x is None else f'{x:.4g}'
    met = {None:'–', True:'yes', False:'no'}
    cells = [[r['name'], f"{num(r['value'])} {r['unit']}", *(num(r[k]) for k in ('baseline','ratio','goal')), met[r['met']]]
             for r in records]
    head = ['what', 'measured', 'baseline', 'ratio', 'goal', 'met']
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [head, ['---']*6, *cells])

def clock(
    kept:Path,    # JSON file, a record a start
    jobs:int,     # tasks at once
    before:int,   # trainings that were finished before this start
):                # function that writes down how long this start has taken
    "The wall time of a study that may be stopped and gone on with: what earlier starts took stays."
    earlier,began = starts(kept),perf_counter()
    own = machine(jobs) | dict(jobs=jobs, before=before)
    return lambda: write(kept, [*earlier, own | dict(seconds=round(perf_counter()-began, 1))])

def starts(
    kept:Path,  # from `clock`
) -> list:      # of records, one a start
    "How long each start of a study took, and on which machine."
    return json.loads(kept.read_text()) if kept.is_file() else []

def wall_time(
    kept:Path,     # from `clock`
    what:str,      # name of the study
    goal:float,    # minutes
    done:int,      # trainings that are finished
    whole:int,     # trainings of the whole study
) -> list:         # with one record, or empty; the goal is asked where everything is there, and was made under this clock
    "How long a study took by the clock."
    if not (found := starts(kept)): return []
    whole_of_it = done==whole and found[0]['before']==0
    name = f"{what}: wall time, {len(found)} start{'s'*(len(found)>1)}, {done} of {whole} trainings"
    return [record(name, sum(s['seconds'] for s in found)/60, 'min', goal=goal if whole_of_it else None, better='lower')]

def _worker(threads):
    "Take a share of the cores, and end as for a signal where the parent is gone, however that came."
    def follow(): parent_process().join(); os.kill(os.getpid(), signal.SIGTERM)
    torch.set_num_threads(threads)
    Thread(target=follow, daemon=True).start()

def side_by_side(
    do,             # called with a task, in another process
    tasks:list,     # taken from the front; `then` may add to it
    then,           # called here with each task and its result, as they end
    jobs:int=1,     # tasks at once, each with its share of the cores
    name=str,       # of a task, for the bar
):
    "Do tasks in `jobs` processes. An error or a signal ends all of them: trainings save their state, and go on when they are asked for again."
    if jobs<1: raise ValueError(f"--jobs {jobs}: at least one")
    theirs = dict.fromkeys(('OMP_NUM_THREADS','OPENBLAS_NUM_THREADS'), str(num_threads(jobs)))   # numpy's, scikit-learn's
    theirs['TQDM_DISABLE'] = '1'                        # the processes' own bars would write over each other
    running = {}
    def stop(*_): raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with (tqdm(unit='task') as bar, patch.dict(os.environ, theirs),
              ProcessPoolExecutor(jobs, get_context('spawn'), _worker, (num_threads(jobs),)) as pool):
            try:
                while tasks or running:
                    while tasks and len(running)<jobs:
                        task = tasks.pop(0)
                        running[pool.submit(do, task)] = task
                    bar.total = bar.n+len(running)+len(tasks)
                    bar.set_description('; '.join(name(t) for t in running.values()))
                    for ended in wait(running, return_when=FIRST_COMPLETED).done:
                        task = running.pop(ended)
                        if ended.exception(): bar.write(f'failed: {name(task)}')
                        then(task, ended.result())
                        bar.update()
            except BaseException:
                for process in active_children(): process.terminate()
                raise
    finally: signal.signal(signal.SIGTERM, before)
