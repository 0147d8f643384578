"Camera words, containers and tables: round trips, other decoders, clocks that start over, windows, files that lie."
import resource, subprocess, sys, time, zipfile
import numpy as np, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from mem_nb.events import EVENT_DTYPE, make_events
from mem_nb.formats import WRITERS, EventFileError, event_chunks, open_recording, read_events, recording_size, sensor_size, write_events

def some_events(n=500, size=(48,64), span=900_000, seed=0):
    rng = np.random.default_rng(seed)
    return make_events(rng.integers(0,size[1],n), rng.integers(0,size[0],n), np.sort(rng.integers(0,span,n)), rng.integers(0,2,n))

def evt21(e, legacy=False):
    "EVT2.1 from the public specification, one event a word: time words, then p, 6 bits of t, x, y and a mask of 32."
    words,high = [],None
    for x,y,t,p in e.tolist():
        if t>>6!=high: high = t>>6; words.append(8<<60 | high<<32)
        words.append(int(p)<<60 | (t&63)<<54 | (x//32*32)<<43 | y<<32 | 1<<x%32)
    a = np.array(words, '<u8')
    head = b'% evt 2.1\n% format EVT21;height=48;width=64' + b';endianness=legacy'*legacy + b'\n% end\n'
    return head + (a<<np.uint64(32) | a>>np.uint64(32) if legacy else a).astype('<u8').tobytes()

def evt3(times):
    "EVT3: one event at x = 1, y = 2 for every time, of 24 bits."
    words = []
    for t in times: words += [0x8000 | t>>12 & 0xfff, 0x6000 | t & 0xfff, 0x0002, 0x2801]
    return b'% evt 3.0\n% end\n' + np.array(words, '<u2').tobytes()

# ---- round trips
events_strategy = st.lists(st.tuples(st.integers(0,255), st.integers(0,255), st.integers(0,2**23-1), st.booleans()), min_size=1, max_size=60)

@pytest.mark.parametrize('suffix', WRITERS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=events_strategy)
def test_what_is_written_is_read(suffix, rows, tmp_path):
    if suffix in ('.h5','.hdf5'): pytest.importorskip('h5py')
    e = np.array(sorted(rows, key=lambda r: r[2]), EVENT_DTYPE)
    write_events(tmp_path/f'a{suffix}', e, (256,256)); assert (read_events(tmp_path/f'a{suffix}')==e).all()

@pytest.mark.parametrize('suffix', WRITERS)
@pytest.mark.parametrize('chunk', [1,7,500,10**6])
def test_chunks_and_windows_are_the_whole(suffix, chunk, tmp_path):
    if suffix in ('.h5','.hdf5'): pytest.importorskip('h5py')
    e = some_events(); e['t'][100:140] = e['t'][100]                     # equal times stay
    write_events(tmp_path/f'a{suffix}', e); path = tmp_path/f'a{suffix}'
    parts = list(event_chunks(path, chunk)); assert max(map(len, parts))<=chunk and (np.concatenate(parts)==e).all()
    for a,b in [(0,1), (e['t'][100],e['t'][100]+1), (300_000,600_000), (None,400_000), (500_000,None), (10**7,10**8), (5,5)]:
        a,b = a if a is None else int(a), b if b is None else int(b)
        keep = np.ones(len(e), bool) if a is None else e['t']>=a
        if b is not None: keep &= e['t']<b
        got = read_events(path, a, b); assert got.dtype==EVENT_DTYPE and (len(got)==keep.sum()) and (got==e[keep]).all()

@pytest.mark.parametrize('legacy', [False,True])
def test_evt21_in_both_orders_of_halves(legacy, tmp_path):
    e = some_events(); (tmp_path/'a.raw').write_bytes(evt21(e, legacy))
    assert (read_events(tmp_path/'a.raw')==e).all() and recording_size(tmp_path/'a.raw')==(48,64)

# ---- other decoders
@pytest.mark.parametrize('suffix,more', [('.raw',dict(version='evt2')), ('.raw',dict(version='evt3')), ('.dat',{}), ('.aedat4',{})])
def test_what_faery_writes(suffix, more, tmp_path):
    faery = pytest.importorskip('faery')
    if suffix=='.aedat4': pytest.importorskip('aedat')
    e = some_events(); a = np.empty(len(e), faery.EVENTS_DTYPE)
    for k,field in zip('xytp', ('x','y','t','on')): a[field] = e[k]
    faery.events_stream_from_array(a, (64,48)).to_file(tmp_path/f'a{suffix}', **more)
    got = read_events(tmp_path/f'a{suffix}'); got['t'] += e['t'][0]-got['t'][0]          # it may count from the first
    assert (got==e).all()

def test_tonic_reads_our_bin(tmp_path):
    io = pytest.importorskip('tonic.io')
    e = some_events(); write_events(tmp_path/'a.bin', e); got = io.read_mnist_file(str(tmp_path/'a.bin'), dtype=np.dtype([('x',int),('y',int),('t',int),('p',int)]))
    assert all((got[k]==e[k]).all() for k in 'xytp')

# ---- clocks
def test_evt3_and_evt2_clocks_are_carried_on(tmp_path):
    (tmp_path/'a.raw').write_bytes(evt3([2**24-5000, 2**24-1, 3, 2**24-1, 7]))
    assert read_events(tmp_path/'a.raw')['t'].tolist()==[2**24-5000, 2**24-1, 2**24+3, 2**25-1, 2**25+7]
    words = [8<<28 | 2**28-1, 5<<22 | 1<<11 | 2, 8<<28 | 0, 6<<22 | 1<<11 | 2]
    (tmp_path/'b.raw').write_bytes(b'% evt 2.0\n% end\n' + np.array(words, '<u4').tobytes())
    assert read_events(tmp_path/'b.raw')['t'].tolist()==[2**34-64+5, 2**34+6]

@pytest.mark.parametrize('suffix,bits', [('.bin',23), ('.dat',32)])
def test_a_clock_that_starts_over_is_refused_where_no_word_tells(suffix, bits, tmp_path):
    early,late = tmp_path/f'a{suffix}',tmp_path/f'b{suffix}'
    e = make_events([1,1], [2,2], [3,4], [1,0]); write_events(early, e)
    e['t'] = 2**bits-9,2**bits-1; write_events(late, e)
    raw = late.read_bytes() + early.read_bytes()[-2*(5 if suffix=='.bin' else 8):]; late.write_bytes(raw)
    with pytest.raises(EventFileError, match=f'the clock of {bits} bits started over'): read_events(late)

def test_row_240_of_a_bin_is_a_row_or_outside(tmp_path):
    write_events(tmp_path/'a.bin', make_events([0,0], [5,240], [1,2], [1,0]))
    assert read_events(tmp_path/'a.bin')['y'].tolist()==[5,240]
    with pytest.raises(EventFileError, match='y = 240 at event 1'): read_events(tmp_path/'a.bin', size=(240,304))

@pytest.mark.parametrize('suffix', WRITERS)
def test_pixels_outside_the_sensor_and_sensors_that_disagree(suffix, tmp_path):
    if suffix in ('.h5','.hdf5'): pytest.importorskip('h5py')
    path = tmp_path/f'a{suffix}'; write_events(path, some_events())
    for size in ((20,64),(48,20)):
        with pytest.raises(EventFileError, match='lies outside'): read_events(path, size=size)
    with pytest.raises(EventFileError, match='disagree'): sensor_size(path, (48,64), (48,65))
    with pytest.raises(EventFileError, match='disagree'): open_recording(path, registered=(48,64), given=(64,48))

# ---- packages that are not there, codecs that are not known
@pytest.mark.parametrize('name,package', [('a.h5','h5py'), ('a.aedat4','aedat')])
def test_a_missing_package_says_how_to_get_it(name, package, tmp_path, monkeypatch):
    (tmp_path/name).write_bytes(b'\x89HDF\r\n\x1a\n' if name=='a.h5' else b'#!AER-DAT4.0\r\n'); monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'mem_nb\[formats\]'"): read_events(tmp_path/name)

@pytest.mark.parametrize('pack', [{}, dict(compression='gzip', chunks=(64,)), dict(compression='lzf', shuffle=True, chunks=(64,))])
def test_prophesee_hdf5_with_standard_filters(pack, tmp_path):
    h5py = pytest.importorskip('h5py')
    e = some_events(); table = np.empty(len(e), [('x','<u2'),('y','<u2'),('p','<i2'),('t','<i8')])
    for k in 'xytp': table[k] = e[k]
    with h5py.File(tmp_path/'a.h5', 'w') as f: f.create_dataset('CD/events', data=table, **pack); f.attrs['geometry'] = '64x48'
    assert (read_events(tmp_path/'a.h5')==e).all() and recording_size(tmp_path/'a.h5')==(48,64)

# ---- memory
def test_a_zip_bomb_and_a_lying_hdf5_are_refused_at_once(tmp_path):
    with zipfile.ZipFile(tmp_path/'a.npz', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('event_data.npy', bytes(10**6))
    raw = bytearray((tmp_path/'a.npz').read_bytes()); at = raw.rindex(b'PK\x01\x02'); raw[at+24:at+28] = (2**32-2).to_bytes(4, 'little'); (tmp_path/'a.npz').write_bytes(raw)
    h5py = pytest.importorskip('h5py')
    with h5py.File(tmp_path/'b.h5', 'w') as f:
        for k in 'xytp': f.create_dataset(f'events/{k}', shape=(10**12,), dtype='u2', chunks=(1000,))
    most,start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,time.process_time()      # of this process, whatever runs beside it
    for name in ('a.npz','b.h5'):
        with pytest.raises(EventFileError, match='claims'): read_events(tmp_path/name)
    assert time.process_time()-start<2 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-most<50*2**10

@pytest.mark.parametrize('suffix', ['.bin','.dat','.raw','.npy'])
def test_a_long_file_in_chunks_stays_small(suffix, tmp_path):
    e = some_events(5_000_000, span=2**23); write_events(tmp_path/f'a{suffix}', e)
    code = ("import resource,sys; from mem_nb.formats import event_chunks; rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = rss(); "
            "print(sum(map(len, event_chunks(sys.argv[1]))), (rss()-before)>>10)")
    told = subprocess.run([sys.executable, '-c', code, str(tmp_path/f'a{suffix}')], capture_output=True, text=True); assert not told.returncode, told.stderr
    n,mib = map(int, told.stdout.split()); assert n==len(e) and mib<30       # the array takes 62 MiB
