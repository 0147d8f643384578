"Packing: windows, sources, many processes, and what a kill leaves behind."
import errno, json, os, random, signal, subprocess, sys, time
from types import SimpleNamespace
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from mem_nb import pack
from mem_nb.events import make_events, pack_events, windows_by_count, windows_by_time
from mem_nb.formats import write_bin
from mem_nb.pack import Recording, Row, Sample, TimeWindows, Window, count_windows, done_groups, pack_source, source_groups, write_split

def some_events(n=500, seed=0, size=(20,30), span=100_000):
    rng = np.random.default_rng(seed)
    return make_events(rng.integers(0, size[1], n), rng.integers(0, size[0], n), np.sort(rng.integers(0, span, n)), rng.integers(0, 2, n))

def recordings(folder, num=40, each=3000, split='train'):
    folder.mkdir(exist_ok=True)
    for i in range(num): write_bin(folder/f'{i:03d}.bin', some_events(each+i, i))
    return [Recording(p, '', split, p.stem) for p in sorted(folder.glob('*.bin'))]

# ---- windows
times = st.lists(st.integers(0, 300), min_size=1, max_size=60).map(lambda steps: np.cumsum(steps) + 7)

@settings(max_examples=200, deadline=None)
@given(times, st.integers(1, 400), st.sampled_from([0, .25, .5, .9]), st.lists(st.integers(1, 59), max_size=6))
def test_windows_by_time_are_the_same_in_chunks_as_at_once(t, us, overlap, cuts):
    window = Window(us=us, overlap=overlap)
    machine = TimeWindows(window)
    for part in np.split(t, sorted({c for c in cuts if c<len(t)})): machine.add(part)
    events = make_events(t*0, t*0, t, t*0)
    assert [tuple(w) for w in machine.windows().tolist()]==windows_by_time(events, us, us-window.stride)

@given(st.integers(1, 300), st.integers(1, 90), st.sampled_from([0, .25, .5, .9]))
def test_windows_by_count_cover_every_event(n, count, overlap):
    window = Window(count, overlap=overlap)
    found = count_windows(n, window)
    assert [tuple(w) for w in found.tolist()]==windows_by_count(range(n), count, count-window.stride)
    assert set(np.concatenate([np.arange(a,b) for a,b in found]))==set(range(n))

def test_a_time_that_is_wrong_does_not_fill_the_memory_with_windows(tmp_path):
    events = make_events([1,1], [1,1], [0,2**37], [0,1])
    with pytest.raises(ValueError, match='more than .* windows of 10 µs.*is a time wrong'):
        pack_source(Sample([(events,0)], 0, '', 'train'), Row(tmp_path), window=Window(us=10))

# ---- one source
def test_words_are_those_of_pack_events_and_a_row_may_spill(tmp_path):
    rec,row = recordings(tmp_path/'r', 1, 100_000)[0],Row(tmp_path, memory=8*2**15)
    facts = pack_source(rec, row)
    with open(tmp_path/'out', 'wb') as f: row.copy_to(f)
    events = some_events(100_000, 0)
    words = pack_events(events, events['t'][0])
    assert np.array_equal(np.fromfile(tmp_path/'out', '<u8'), words) and len(row)==0
    assert facts['events']==100_000 and facts['extent']==[20,30] and facts['first_us']==events['t'][0]

def test_a_source_that_breaks_off_leaves_nothing(tmp_path):
    def breaks(path, chunk, size=None): yield some_events(1000); raise ValueError('byte 77 is wrong')
    row = Row(tmp_path, memory=8*700*2)   # so that the first chunk is in the file already
    good = Recording(tmp_path/'x.bin', '', 'train', 'x', lambda *a, **k: iter([some_events(700)]))
    (tmp_path/'x.bin').write_bytes(b'x')
    pack_source(good, row)
    with pytest.raises(ValueError, match='byte 77'): pack_source(Recording(tmp_path/'x.bin', '', 'train', 'y', breaks), row)
    assert len(row)==700
    with open(tmp_path/'out', 'wb') as f: row.copy_to(f)
    assert np.array_equal(np.fromfile(tmp_path/'out', '<u8'), pack_events(some_events(700), some_events(700)['t'][0]))

@pytest.mark.parametrize('events', [make_events([4096],[1],[5],[1]), make_events([1],[5000],[5],[1]), make_events([1,1],[1,1],[0,2**38],[1,1])])
def test_an_event_that_needs_more_than_eight_bytes_is_refused(events, tmp_path):
    with pytest.raises(ValueError, match='does not fit in'): pack_source(Sample([(events,0)], 0, 'c', 'train'), Row(tmp_path))

def test_memory_does_not_grow_with_the_recording(tmp_path):
    "20 million events, 160 MB packed: the process should not grow by more than the row and a chunk."
    code = f"""
import resource, sys, numpy as np
from pathlib import Path
from mem_nb.pack import Recording, Row, pack_source
from mem_nb.events import make_events
def reader(path, chunk, size=None):
    i = np.arange(chunk)
    for k in range(20_000_000//chunk): yield make_events(i%300, i%200, i + k*chunk, i%2)
path = Path({str(tmp_path)!r})/'x.bin'; path.write_bytes(b'x')
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
facts = pack_source(Recording(path, '', 'train', 'x', reader), Row({str(tmp_path)!r}, 2**24))
print(facts['events'], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    events,grown = map(int, subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split())
    assert events>19_900_000 and grown < 64*1024   # KiB

# ---- many processes
def file_of(tmp_path, name, recs, workers):
    folder = tmp_path/name; folder.mkdir()
    write_split(recs, folder, 'train', workers)
    return (folder/'train.events').read_bytes()

def test_groups_cover_all_sources_in_order(monkeypatch):
    monkeypatch.setattr(pack, 'GROUP', 100)
    groups = source_groups([SimpleNamespace(bytes=b) for b in (60,60,10,10,10,300,1,1)], most=3)
    assert groups==[(0,1),(1,4),(4,5),(5,6),(6,8)] and source_groups([])==[(0,0)]

def test_the_file_is_the_same_with_any_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, 'GROUP', 50_000)
    recs = recordings(tmp_path/'r')
    one = file_of(tmp_path, 'one', recs, 1)
    assert one==file_of(tmp_path, 'two', recs, 2)==file_of(tmp_path, 'five', recs, 5) and len(one)==8*sum(3000+i for i in range(40))

def test_a_full_disk_in_one_worker_ends_all_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, 'GROUP', 50_000)
    def full(path, chunk, size=None): raise OSError(errno.ENOSPC, 'No space left on device')
    recs = recordings(tmp_path/'r')
    recs[3] = Recording(recs[3].path, '', 'train', 'x', full)
    began = time.time()
    with pytest.raises(OSError, match='No space'): file_of(tmp_path, 'out', recs, 3)
    assert time.time()-began < 60

def test_a_killed_worker_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, 'GROUP', 50_000)
    def dies(path, chunk, size=None): os.kill(os.getpid(), signal.SIGKILL)
    recs = recordings(tmp_path/'r')
    recs[9] = Recording(recs[9].path, '', 'train', 'x', dies)
    with pytest.raises(OSError, match='a worker of prepare was killed.*run the same command again'): file_of(tmp_path, 'out', recs, 2)

def test_what_was_written_is_believed_only_with_its_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, 'GROUP', 50_000)
    recs = recordings(tmp_path/'r'); whole = file_of(tmp_path, 'out', recs, 1); folder = tmp_path/'out'
    groups = len(list(folder.glob('train-*.json')))
    assert done_groups(folder, 'train')==(groups, len(whole), 40)
    with open(folder/'train.events', 'r+b') as f: f.seek(len(whole)//2); f.write(b'\xff'*8)
    done,end,stop = done_groups(folder, 'train')
    assert 0<done<groups and end<=len(whole)//2 and stop<40 and (folder/'train.events').stat().st_size==end
    write_split(recs, folder, 'train', 2)
    assert (folder/'train.events').read_bytes()==whole

def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    "SIGKILL for all processes of prepare, again and again; what is there is kept, and the end is the same."
    recs = recordings(tmp_path/'r', 60)
    code = f"""
import sys; from pathlib import Path
from mem_nb import pack, store
pack.GROUP = 20_000
root = Path({str(tmp_path)!r})
recs = [pack.Recording(p, '', 'train' if i%3 else 'val', p.stem) for i,p in enumerate(sorted((root/'r').glob('*.bin')))]
store.write_store(recs, root/sys.argv[1], workers=2, window=pack.Window(700))"""
    start = lambda name: subprocess.Popen([sys.executable, '-c', code, name], start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert start('whole').wait()==0
    rng,kills = random.Random(0),0
    notes = lambda: len(list(tmp_path.glob('killed.preparing/*-*.json')))
    for _ in range(6):
        run,wanted = start('killed'),notes() + rng.randint(1, 6)
        while run.poll() is None and notes()<wanted: time.sleep(.001)
        if run.poll() is None: os.killpg(run.pid, signal.SIGKILL); kills += 1
        run.wait()
    assert start('killed').wait()==0 and kills
    assert not (tmp_path/'killed.preparing').exists()
    for name in ('train.events','val.events','sources.jsonl'): assert (tmp_path/'whole'/name).read_bytes()==(tmp_path/'killed'/name).read_bytes()
    for name in ('train.npz','val.npz'):
        a,b = np.load(tmp_path/'whole'/name),np.load(tmp_path/'killed'/name)
        assert all(np.array_equal(a[k], b[k]) for k in a)
    a,b = (json.loads((tmp_path/n/'manifest.json').read_text()) for n in ('whole','killed'))
    assert {k:v for k,v in a.items() if k!='index'}=={k:v for k,v in b.items() if k!='index'}

def test_workers_die_with_the_process_that_started_them(tmp_path):
    "Only the parent is killed; the same command continues at once, and no worker is left."
    code = f"""
import sys, time; from pathlib import Path
from mem_nb import pack, store
pack.GROUP = 1
def slow(path, chunk, size=None):
    time.sleep(.05); yield from iter([__import__('mem_nb.events', fromlist=['x']).make_events([1],[1],[0],[1])])
root = Path({str(tmp_path)!r})
recs = [pack.Recording(p, '', 'train', p.stem, slow if sys.argv[1]=='slow' else None) for p in sorted((root/'r').glob('*.bin'))]
store.write_store(recs, root/'store', workers=2)"""
    recordings(tmp_path/'r', 60, 50)
    run = subprocess.Popen([sys.executable, '-c', code, 'slow'], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob('store.preparing/train-*.json')): time.sleep(.02); assert run.poll() is None
    children = [int(p) for p in open(f'/proc/{run.pid}/task/{run.pid}/children').read().split()]
    os.kill(run.pid, signal.SIGKILL); run.wait()
    deadline = time.time()+20
    while any(os.path.exists(f'/proc/{c}') and 'Z' not in open(f'/proc/{c}/stat').read().split(')')[1][:3] for c in children) and time.time()<deadline: time.sleep(.05)
    assert children and time.time()<deadline
    assert subprocess.run([sys.executable, '-c', code, 'fast'], capture_output=True).returncode==0 and (tmp_path/'store'/'manifest.json').exists()

def test_a_readers_own_types_become_ours(tmp_path):
    e = np.zeros(4, [('x','f4'),('y','u1'),('t','f8'),('p','i1')]); e['x'],e['y'],e['t'],e['p'] = [1,2,3,4],5,[0,1,2,3],[-1,1,-1,1]
    (tmp_path/'a').write_bytes(b'x')
    row = Row(tmp_path)
    pack_source(Recording(tmp_path/'a', 'c', 'train', 'a', lambda *a, **k: iter([e])), row)
    from mem_nb.events import unpack_events
    assert unpack_events(row.words[:4].copy()).tolist()==[(1,5,0,False),(2,5,1,True),(3,5,2,False),(4,5,3,True)]

@pytest.mark.parametrize('suffix', ['.txt','.npy','.npz'])
def test_text_and_rows_of_floats_go_in(tmp_path, suffix):
    e = some_events(100); rows = np.stack([e['x'],e['y'],e['t'],e['p']*2.-1], 1)
    path = tmp_path/f'a{suffix}'
    if suffix=='.txt': np.savetxt(path, rows[:,[2,0,1,3]], fmt='%d')
    elif suffix=='.npy': np.save(path, rows)
    else: np.savez(path, event_data=rows)
    row = Row(tmp_path); pack_source(Recording(path, '', 'train'), row)
    assert np.array_equal(row.words[:100], pack_events(e, e['t'][0]))

def test_what_the_machine_does_wrong_is_no_refusal(tmp_path):
    recs = recordings(tmp_path/'r', 4)
    def stale(path, chunk, size=None): raise OSError(errno.ESTALE, 'Stale file handle')
    recs[2] = Recording(recs[2].path, '', 'train', 'x', stale)
    with pytest.raises(OSError, match='002.bin: Stale file handle.*run the same command again'): file_of(tmp_path, 'out', recs, 1)

def test_the_one_to_blame_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, 'GROUP', 1)
    recs = recordings(tmp_path/'r', 12)
    def wrong(path, chunk, size=None): raise TypeError('my reader is wrong')
    recs[5] = Recording(recs[5].path, '', 'train', 'x', wrong)
    for k in range(4):
        with pytest.raises(TypeError, match='my reader is wrong'): file_of(tmp_path, f'out{k}', recs, 4)
