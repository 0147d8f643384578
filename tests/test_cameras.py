"Every format: there and back, in pieces, by window, against other people's readers; and each rule for bad input."
import subprocess, sys
from pathlib import Path
import numpy as np, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from mem_nb import cameras, containers
from mem_nb.events import EventFileError, make_events
from mem_nb.formats import WRITERS, event_chunks, file_format, open_recording, read_events, recording_size, sensor_size, write_events

def events(n=3000, seed=0, size=(48,64), span=200_000):
    rng = np.random.default_rng(seed)
    return make_events(rng.integers(0, size[1], n), rng.integers(0, size[0], n), np.sort(rng.integers(0, span, n)), rng.integers(0, 2, n))

def faery_file(path, e, size, **how):
    faery = pytest.importorskip('faery')
    a = np.empty(len(e), faery.EVENTS_DTYPE)
    for k,field in zip('xytp', ('x','y','t','on')): a[field] = e[k]
    faery.events_stream_from_array(a, size[::-1]).to_file(path, **how)
    return path

def any_file(folder, kind, e, size=(48,64)):
    "The events as a file of some kind."
    path = folder/f"a{dict(evt2='.raw', hdf5='.h5', text='.txt').get(kind, '.'+kind)}"
    if kind=='npz': np.savez_compressed(path, event_data=e)
    elif kind=='text': np.savetxt(path, np.stack([e['t'],e['x'],e['y'],e['p']], 1), fmt='%d')
    elif kind=='evt3': return faery_file(folder/'b.raw', e, size, version='evt3')
    elif kind=='aedat4': pytest.importorskip('aedat'); return faery_file(path, e, size)
    else:
        if kind=='hdf5': pytest.importorskip('h5py')
        write_events(path, e, size)
    return path

KINDS = ('bin','dat','evt2','evt3','aedat4','hdf5','npz','npy','text')
ANY = st.lists(st.tuples(st.integers(0,255), st.integers(0,255), st.integers(0,10**5), st.booleans()), min_size=1, max_size=80)

# ---- there and back
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ANY)
@pytest.mark.parametrize('suffix', WRITERS)
def test_there_and_back_is_exact(suffix, rows, tmp_path):
    if suffix in ('.h5','.hdf5'): pytest.importorskip('h5py')
    x,y,steps,p = zip(*rows)
    e = make_events(x, y, np.minimum(np.cumsum(steps), 2**23-1), p)
    write_events(tmp_path/f'a{suffix}', e, (256,256))
    assert np.array_equal(read_events(tmp_path/f'a{suffix}'), e)
    assert not list(tmp_path.glob('*.part'))

@pytest.mark.parametrize('suffix,size', [('.dat',(48,64)), ('.raw',(48,64)), ('.h5',(48,64)), ('.bin',None), ('.npy',None)])
def test_the_header_tells_the_size_where_the_format_has_one(suffix, size, tmp_path):
    if suffix=='.h5': pytest.importorskip('h5py')
    write_events(tmp_path/f'a{suffix}', events(), (48,64))
    assert recording_size(tmp_path/f'a{suffix}')==size

# ---- pieces and windows
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('chunk', [1, 7, 1000, 10**6])
def test_pieces_are_the_whole(kind, chunk, tmp_path):
    e = events(300 if chunk==1 else 3000)
    path = any_file(tmp_path, kind, e)
    parts = list(event_chunks(path, chunk))
    assert np.array_equal(np.concatenate(parts), e) and np.array_equal(read_events(path), e) and max(map(len, parts))<=chunk

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('start,end', [(None,50_000), (50_000,None), (30_000,60_000), (60_000,60_000), (10**6,None), (None,0)])
def test_a_window_is_that_part_of_the_whole(kind, start, end, tmp_path):
    e = events()
    path = any_file(tmp_path, kind, e)
    inside = (e['t']>=(start or 0)) & (e['t']<(10**9 if end is None else end))
    assert np.array_equal(read_events(path, start, end), e[inside])       # an empty window is an empty array

def test_a_long_file_is_read_in_little_memory(tmp_path):
    "30 million events, 240 MB: a process that goes through them grows by a few MB."
    code = f"""
import resource, numpy as np
from mem_nb.formats import DAT, open_recording
with open({str(tmp_path/'long.dat')!r}, 'wb') as f:
    f.write(b'% Width 64' + bytes([10]) + b'% Height 48' + bytes([10,12,8]))
    for k in range(30):
        r = np.empty(10**6, DAT); i = np.arange(10**6)
        r['t'],r['word'] = i+k*10**6, i%64 | i%48<<14
        r.tofile(f)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
n = sum(len(t) for x,y,t,p in open_recording({str(tmp_path/'long.dat')!r})[1])
print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)"""
    n,grown = map(int, subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split())
    assert n==30_000_000 and grown<30*1024     # KiB

# ---- other people's readers and writers
@pytest.mark.parametrize('suffix,how', [('.dat',{}), ('.raw',dict(version='evt2')), ('.raw',dict(version='evt3')), ('.aedat4',{})])
def test_files_that_faery_writes_read_the_same(suffix, how, tmp_path):
    if suffix=='.aedat4': pytest.importorskip('aedat')
    e = events(20_000, size=(240,320), span=3_000_000)
    path = faery_file(tmp_path/f'a{suffix}', e, (240,320), **how)
    assert np.array_equal(read_events(path), e) and recording_size(path) in ((240,320), None)

@pytest.mark.parametrize('suffix', ['.dat','.raw'])
def test_faery_reads_what_we_write(suffix, tmp_path):
    faery,e = pytest.importorskip('faery'),events(5000)
    write_events(tmp_path/f'a{suffix}', e, (48,64))
    theirs = np.concatenate(list(faery.events_stream_from_file(tmp_path/f'a{suffix}')))
    for k,field in zip('xytp', ('x','y','t','on')): assert np.array_equal(theirs[field].astype(np.int64), e[k].astype(np.int64)), k

def test_tonic_reads_our_bin_the_same(tmp_path):
    tonic = pytest.importorskip('tonic')
    from tonic.io import read_mnist_file
    e = events(size=(34,34))
    write_events(tmp_path/'a.bin', e)
    theirs = read_mnist_file(str(tmp_path/'a.bin'), dtype=np.dtype([('x',int),('y',int),('t',int),('p',int)]))
    for k in 'xytp': assert np.array_equal(theirs[k], e[k].astype(int))

# ---- clocks
def test_evt2_and_evt3_clocks_are_carried_on(tmp_path):
    high = np.array([2**28-2, 2**28-1, 0, 1])
    assert np.diff(cameras.unwrap(high, -1, 28)).tolist()==[1,1,1]
    assert cameras.unwrap(np.array([3,4]), 2**28+2, 28).tolist()==[2**28+3, 2**28+4]     # a piece goes on where the last one was
    words = [8<<12|0xffe, 6<<12|5, 5, 2<<12|9, 8<<12|0xfff, 6<<12|5, 5, 2<<12|10, 8<<12, 6<<12|7, 5, 2<<12|11]
    (tmp_path/'a.raw').write_bytes(b'% evt 3.0\n% geometry 64x48\n% end\n' + np.array(words, '<u2').tobytes())
    t = read_events(tmp_path/'a.raw')['t']
    assert t.tolist()==[0xffe<<12|5, 0xfff<<12|5, 0x1000<<12|7]                          # 24 bits, and on

@pytest.mark.parametrize('suffix,bits', [('.bin',23), ('.dat',32)])
def test_a_clock_that_starts_over_unnoticed_is_refused_and_explained(suffix, bits, tmp_path):
    write_events(tmp_path/f'a{suffix}', make_events([1,2],[1,2],[5,9],[1,0]))
    raw = (tmp_path/f'a{suffix}').read_bytes()
    last = make_events([1,2],[1,2],[2**bits-9,2**bits-5],[1,0])
    write_events(tmp_path/f'b{suffix}', last)
    record = 5 if suffix=='.bin' else 8
    (tmp_path/f'c{suffix}').write_bytes((tmp_path/f'b{suffix}').read_bytes() + raw[-2*record:])
    with pytest.raises(EventFileError, match=f'clock of {bits} bits started over'): read_events(tmp_path/f'c{suffix}')

@pytest.mark.parametrize('legacy', [False, True])
def test_evt21_in_both_orders_of_its_halves(legacy, tmp_path):
    words = [8<<60|3<<32, 1<<60|5<<54|32<<43|7<<32|0b1001, 6<<54|0<<43|9<<32|1<<31|1]
    a = np.array(words, np.uint64)
    if legacy: a = a<<np.uint64(32) | a>>np.uint64(32)
    (tmp_path/'a.raw').write_bytes(b'% evt 2.1\n% geometry 64x48\n' + (b'% format EVT21;endianness=legacy;height=48;width=64\n' if legacy else b'% format EVT21;endianness=little;height=48;width=64\n') + b'% end\n' + a.tobytes())
    e = read_events(tmp_path/'a.raw')
    assert file_format(tmp_path/'a.raw')=='evt21'
    assert e.tolist()==[(32,7,3<<6|5,True), (35,7,3<<6|5,True), (0,9,3<<6|6,False), (31,9,3<<6|6,False)]

# ---- HDF5
def test_prophesees_hdf5(tmp_path):
    h5py,e = pytest.importorskip('h5py'),events()
    a = np.empty(len(e), [('x','<u2'),('y','<u2'),('p','<i2'),('t','<i8')])
    for k in 'xytp': a[k] = e[k]
    with h5py.File(tmp_path/'a.hdf5', 'w') as f:
        f.create_dataset('CD/events', data=a, compression='gzip'); f.attrs['geometry'] = '64x48'
    assert np.array_equal(read_events(tmp_path/'a.hdf5'), e) and recording_size(tmp_path/'a.hdf5')==(48,64)

def test_dsec_times_are_absolute_and_windows_use_the_index(tmp_path):
    h5py,e = pytest.importorskip('h5py'),events()
    write_events(tmp_path/'events.h5', e, (480,640))
    with h5py.File(tmp_path/'events.h5', 'r+') as f:
        before = int(f['t_offset'][()]); del f['t_offset']; f['t_offset'] = before+10**9
    assert np.array_equal(read_events(tmp_path/'events.h5')['t'], e['t']+10**9)                      # defect 8: they were stored as 0
    assert np.array_equal(read_events(tmp_path/'events.h5', 10**9+50_000, 10**9+60_000)['t']-10**9, e['t'][(e['t']>=50_000)&(e['t']<60_000)])

def test_hdf5_that_claims_more_than_it_holds_is_refused(tmp_path):
    h5py = pytest.importorskip('h5py')
    with h5py.File(tmp_path/'a.h5', 'w') as f:
        for k in 'xytp': f.create_dataset(f'events/{k}', (10**12,), 'i8', chunks=(1000,))
    with pytest.raises(EventFileError, match='a.h5'): read_events(tmp_path/'a.h5')

@pytest.mark.parametrize('kind,package', [('hdf5','h5py'), ('aedat4','aedat')])
def test_a_missing_package_names_the_extra(kind, package, tmp_path, monkeypatch):
    path = any_file(tmp_path, kind, events())
    real = cameras.importlib.import_module
    def absent(name, *a):
        if name==package: raise ImportError(name)
        return real(name, *a)
    monkeypatch.setattr(cameras.importlib, 'import_module', absent)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'mem_nb\[formats\]'"): read_events(path)

# ---- bad input
def test_a_zip_bomb_is_refused_before_it_goes_off(tmp_path):
    import zipfile
    with zipfile.ZipFile(tmp_path/'a.npz', 'w', zipfile.ZIP_DEFLATED) as z:
        with z.open('event_data.npy', 'w', force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, dict(descr='<f8', fortran_order=False, shape=(10**11,4)))
            f.write(bytes(10**6))
    with pytest.raises(EventFileError, match='promises|claims'): read_events(tmp_path/'a.npz')

def test_duplicate_times_are_kept_in_the_files_order(tmp_path):
    e = make_events([3,1,2,1], [0,0,0,0], [5,5,5,9], [1,0,1,1])
    for kind in ('bin','dat','evt2','npy','text'): assert np.array_equal(read_events(any_file(tmp_path, kind, e)), e)

def test_pixels_outside_the_sensor_are_refused_with_their_place(tmp_path):
    path = any_file(tmp_path, 'bin', make_events([3,63], [0,47], [5,9], [1,0]))
    assert len(read_events(path, size=(48,64)))==2
    with pytest.raises(EventFileError, match=r'y = 47 at event 1 lies outside 0..39; is the size of the sensor right'): read_events(path, size=(40,64))

def test_the_row_240_is_a_row_like_any_other(tmp_path):
    "tonic takes y = 240 for a mark of the clock, N-Caltech101's own reader does not; a sensor of 240 rows has no such row."
    path = any_file(tmp_path, 'bin', make_events([3,4], [239,240], [5,9], [1,0]))
    assert read_events(path)['y'].tolist()==[239,240]
    with pytest.raises(EventFileError, match='y = 240 at event 1.*marks that the clock started over'): read_events(path, size=(240,304))

def test_a_size_that_contradicts_another_is_refused(tmp_path):
    path = any_file(tmp_path, 'dat', events())
    assert sensor_size(path)==sensor_size(path, (48,64), (48,64))==(48,64) and sensor_size(any_file(tmp_path, 'bin', events()), None, (180,240))==(180,240)
    with pytest.raises(EventFileError, match=r'its header says \(48, 64\).*the caller says \(180, 240\)'): sensor_size(path, None, (180,240))
    with pytest.raises(EventFileError, match='the registry says'): open_recording(path, registered=(34,34))
