"The study: what it says must follow from the single accuracies that it keeps."
import json, sys
from pathlib import Path
import numpy as np, pytest
from scipy import stats

BENCHMARKS = Path(__file__).parents[1]/'benchmarks'

@pytest.fixture(scope='module')
def evidence():
    sys.path.insert(0, str(BENCHMARKS))
    try: import evidence
    finally: sys.path.remove(str(BENCHMARKS))
    return evidence

def draws(method, values, n=50): return [dict(method=method, labels=n, n_labels=n, seed=s, accuracy=a, subset_hash=f'h{s}', split_hash='s') for s,a in enumerate(values)]

def test_an_interval_is_that_of_a_paired_t_test(evidence):
    rng = np.random.default_rng(0)
    a,b = rng.random((2,5))
    got = evidence.difference(draws('a', a)+draws('b', b), 'a', 'b', 50)
    want = stats.ttest_rel(100*a, 100*b).confidence_interval(.95)
    assert got['low']==pytest.approx(want.low) and got['high']==pytest.approx(want.high)
    assert got['draws']==5 and got['wins']==(a>b).sum()
    assert evidence.difference(draws('a', a[:1])+draws('b', b), 'a', 'b', 50) is None      # one pair has no spread

def test_only_the_same_labels_are_compared(evidence):
    other = [dict(d, subset_hash='x') for d in draws('b', [.1,.2])]
    with pytest.raises(AssertionError, match='other labels'): evidence.difference(draws('a', [.3,.4])+other, 'a', 'b', 50)

def test_means_are_ordered_and_say_how_many_draws(evidence):
    rows = evidence.means(draws('a', [.1,.3])+draws('b', [.9]))
    assert [(r['method'],r['draws'],r['std'] is None) for r in rows]==[('b',1,True),('a',2,False)] and rows[1]['mean']==pytest.approx(20)

@pytest.mark.skipif(not (BENCHMARKS/'evidence.json').is_file(), reason='the study was not run')
def test_what_was_published_follows_from_its_draws(evidence):
    kept = json.loads((BENCHMARKS/'evidence.json').read_text())
    found = [r for r in kept if r['kind']=='draw']
    assert len({r['split_hash'] for r in found})==1
    for r in evidence.means(found):
        said, = [k for k in kept if k['kind']=='mean' and (k['method'],k['n_labels'])==(r['method'],r['n_labels'])]
        assert said['value']==pytest.approx(r['mean']) and said['draws']==r['draws']
    for k in (k for k in kept if k['kind']=='difference'):
        d = evidence.difference(found, k['a'], k['b'], k['n_labels'])
        assert d['mean']==pytest.approx(k['mean']) and d['low']==pytest.approx(k['low'])

def test_tasks_are_done_side_by_side_and_may_ask_for_more(evidence, monkeypatch):
    from math import sqrt
    monkeypatch.syspath_prepend(BENCHMARKS)        # for the processes, too
    tasks,found = [16.,9.],{}
    def then(task, result):
        found[task] = result
        if result==4: tasks.append(result)
    evidence.side_by_side(sqrt, tasks, then, 2)
    assert found=={16.:4., 9.:3., 4.:2.} and not tasks
    with pytest.raises(ValueError): evidence.side_by_side(sqrt, [-1.,4.], then, 2)
    with pytest.raises(ValueError, match='at least one'): evidence.side_by_side(sqrt, [], then, 0)

def test_wall_time_is_that_of_all_starts_and_has_a_goal_where_nothing_was_there_before(evidence, tmp_path):
    import common
    kept = tmp_path/'starts.json'
    assert common.wall_time(kept, 'it', 2, 1, 1)==[]                              # nothing was timed
    first = common.clock(kept, 1, 0); first(); first()
    common.clock(kept, 2, 1)()
    both = common.starts(kept)
    assert [s['jobs'] for s in both]==[1,2] and [s['before'] for s in both]==[0,1] and all(s['seconds']>=0 and s['cpu'] for s in both)
    common.write(kept, [dict(s, seconds=30.) for s in both])
    said, = common.wall_time(kept, 'it', 2, 3, 3)
    assert said['value']==1 and said['goal']==2 and said['met'] and said['name']=='it: wall time, 2 starts, 3 of 3 trainings'
    assert common.wall_time(kept, 'it', 2, 2, 3)[0]['goal'] is None               # not finished
    common.write(kept, both[1:])
    assert common.wall_time(kept, 'it', 2, 3, 3)[0]['goal'] is None               # some was made before anyone looked at the clock

def test_no_goal_is_asked_of_a_trial(evidence):
    import common
    made = [common.record('accuracy', 90., '%', goal=85.)]
    assert common.asked(made, [])==common.asked(made, ['runs_dir=elsewhere', 'data_path = there'])==made
    assert [(r['goal'],r['met'],r['value']) for r in common.asked(made, ['runs_dir=elsewhere', 'pt_lr=1e-3'])]==[(None,None,90.)]

def test_the_environment_is_given_back(evidence, monkeypatch):
    import os
    from math import sqrt
    monkeypatch.syspath_prepend(BENCHMARKS); monkeypatch.setenv('OMP_NUM_THREADS', '7'); monkeypatch.delenv('TQDM_DISABLE', raising=False)
    seen = {}
    evidence.side_by_side(os.getenv, ['OMP_NUM_THREADS','TQDM_DISABLE'], seen.__setitem__, 2)
    assert seen=={'OMP_NUM_THREADS':str(evidence.side_by_side.__globals__['num_threads'](2)), 'TQDM_DISABLE':'1'}
    assert os.environ['OMP_NUM_THREADS']=='7' and 'TQDM_DISABLE' not in os.environ

def test_one_fit_counts_once(evidence):
    same = [dict(d, subset_hash='h') for d in draws('svm on frames', [.9,.9,.9], 600)]
    assert [r['draws'] for r in evidence.means(same)]==[1] and [r['draws'] for r in evidence.means([dict(d, steps=1) for d in same])]==[3]
