"Inspection: counts are kept, faults are told, stores are checked to the last byte."
import subprocess, sys
import matplotlib.pyplot as plt, numpy as np, pytest
from hypothesis import given, settings, strategies as st
from mem_nb.config import parse_config
from mem_nb.datasets import prepare
from mem_nb.events import make_events
from mem_nb.formats import EventFileError, read_events, write_events
from mem_nb.inspect import Tally, hot_pixels, inspect, tally_facts
from mem_nb.store import EventStore

def events(n=2000, seed=0, size=(20,30), span=500_000):
    rng = np.random.default_rng(seed)
    return make_events(rng.integers(0, size[1], n), rng.integers(0, size[0], n), np.sort(rng.integers(0, span, n)), rng.integers(0, 2, n))

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 10**9), st.lists(st.integers(1, 399), max_size=5), st.integers(0, 5))
def test_a_tally_does_not_depend_on_the_pieces_and_loses_nothing(n, span, cuts, seed):
    e = events(n, seed, span=span)
    whole,parts = Tally(bins=64, cloud=50),Tally(bins=64, cloud=50)
    whole.add(e)
    for part in np.split(e, sorted({c for c in cuts if c<n})): parts.add(part)
    assert np.array_equal(whole.counts, parts.counts) and whole.ties==parts.ties and whole.n==parts.n==n
    assert whole.counts.sum()==n==whole.rate.sum()==parts.rate.sum() and whole.bin_us==parts.bin_us and np.array_equal(whole.rate, parts.rate)
    assert 0<sum(map(len, parts.kept))<=2*50+n//2+1

def test_a_hot_pixel_is_found_with_its_place():
    counts = np.ones((2,20,30), int); counts[1,7,11] = 5000
    assert hot_pixels(counts)==[(11,7,5001)] and hot_pixels(np.ones((2,5,5)))==[]

@pytest.mark.parametrize('suffix', ['.bin','.dat','.raw','.npy'])
def test_any_format_is_described_and_drawn(tmp_path, suffix):
    e = events()
    write_events(tmp_path/f'x{suffix}', e, (20,30))
    found = inspect(tmp_path/f'x{suffix}', tmp_path/'x.png')
    assert found.facts['events']=='2,000' and 'ascending' in found.facts['time order'] and (tmp_path/'x.png').stat().st_size>5000
    assert np.array_equal(found.tally.counts.sum(0), np.histogram2d(e['y'], e['x'], (20,30), [(0,20),(0,30)])[0])
    assert 'data:image/png' in found._repr_html_() and 'FAULT' not in str(found)
    plt.close('all')

def test_a_fault_is_told_with_what_came_before_it(tmp_path):
    e = events(100_000); e['t'][70_000] = 0
    np.save(tmp_path/'x.npy', e)
    found = inspect(tmp_path/'x.npy')
    assert 'times run backwards at event 70000' in found.facts['FAULT'] and 'sound events' in found.facts['FAULT']

def test_an_hdf5_file_that_was_cut_is_told(tmp_path):
    pytest.importorskip('h5py')
    write_events(tmp_path/'x.h5', events(), (20,30))
    (tmp_path/'x.h5').write_bytes((tmp_path/'x.h5').read_bytes()[:-100])
    assert 'x.h5: cannot be read as hdf5' in inspect(tmp_path/'x.h5').facts['FAULT']

def test_times_are_not_called_ascending_beyond_a_fault(tmp_path):
    e = events(100); e['t'][70] = 0
    np.save(tmp_path/'x.npy', e)
    assert 'up to the fault' in inspect(tmp_path/'x.npy').facts['time order']

def test_a_store_is_checked_whole(digits, tmp_path):
    folder = prepare(parse_config(f'data_path = {digits}\ndata_set = nmnist\nruns_dir = {tmp_path}'))
    told = str(inspect(folder))
    assert 'train: checksums' in told and 'damaged' not in told and EventStore(folder).split_hash in told
    with open(folder/'val.events', 'r+b') as f: f.seek(800); f.write(b'\0'*8)
    assert '1 damaged: ' in inspect(folder).facts['val: checksums']
    plt.close('all')

def test_the_command_prints_and_draws(tmp_path):
    write_events(tmp_path/'x.bin', events())
    code = 'import sys; from mem_nb.pipeline import main; main(sys.argv[1:])'
    run = lambda *words: subprocess.run([sys.executable, '-c', code, 'inspect', *words], capture_output=True, text=True)
    done = run(str(tmp_path/'x.bin'), f'picture={tmp_path}/x.png')
    assert done.returncode==0 and 'events      2,000' in done.stdout and (tmp_path/'x.png').exists()
    for words,said in (((str(tmp_path/'no.bin'),), 'no such file'), ((str(tmp_path),), 'no packed store'), ((), 'wants a recording'), ((str(tmp_path/'x.bin'), 'pt_lr=1'), 'wants a recording')):
        done = run(*words)
        assert done.returncode!=0 and said in done.stderr and 'Traceback' not in done.stderr

@pytest.mark.parametrize('kind', ['bin','dat','raw','npy','txt','back','outside'])
def test_what_precedes_a_fault_is_counted_and_its_place_told(tmp_path, kind):
    e,path = events(),tmp_path/f"x.{dict(back='npy', outside='npy').get(kind, kind)}"
    if kind=='txt': np.savetxt(path, np.stack([e['t'],e['x'],e['y'],e['p']], 1), fmt='%d')
    elif kind in ('back','outside'):
        e[['t','x'][kind=='outside']][1500] = -1     # the column of one event
        np.save(path, e)
    else: write_events(path, e, (20,30))
    if kind in ('bin','dat','raw','npy','txt'): path.write_bytes(path.read_bytes()[:dict(txt=-6).get(kind, -1)])
    n,place = (1999, dict(txt='line 2000 is').get(kind, f"at byte {path.stat().st_size}" if kind=='npy' else 'at byte')) if kind not in ('back','outside') else (1500, 'at event 1500')
    found = inspect(path, tmp_path/'x.png')
    assert found.tally.n==n and found.facts['events']==f'{n:,}' and found.facts['FAULT'].startswith(f'after {n:,} sound events: ') and place in found.facts['FAULT']
    assert (tmp_path/'x.png').exists()
    with pytest.raises(EventFileError, match='x\\.'): read_events(path)
    plt.close('all')

def test_a_fault_at_the_first_event_leaves_nothing_to_draw(tmp_path):
    e = events(5); e['x'][0] = -1; np.save(tmp_path/'x.npy', e)
    found = inspect(tmp_path/'x.npy', tmp_path/'x.png')
    assert found.tally is None and 'after 0 sound events' in found.facts['FAULT'] and not (tmp_path/'x.png').exists() and 'FAULT' in found._repr_html_()
