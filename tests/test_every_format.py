"Every format by the same laws: pieces are the whole, a window is that part of it, other people's tools agree."
import numpy as np, pytest
from hypothesis import strategies as st
from mem_nb import cameras
from mem_nb.events import make_events
from mem_nb.formats import event_chunks, read_events, recording_size, write_events

def events(n=3000, seed=0, size=(48,64), span=200_000):
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, span, n))     # from 0 on, as faery begins each file
    return make_events(rng.integers(0, size[1], n), rng.integers(0, size[0], n), t-t[0], rng.integers(0, 2, n))

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

# ---- HDF5
def test_dsec_times_are_absolute_and_windows_use_the_index(tmp_path):
    h5py,e = pytest.importorskip('h5py'),events()
    write_events(tmp_path/'events.h5', e, (480,640))
    with h5py.File(tmp_path/'events.h5', 'r+') as f:
        before = int(f['t_offset'][()]); del f['t_offset']; f['t_offset'] = before+10**9
    assert np.array_equal(read_events(tmp_path/'events.h5')['t'], e['t']+10**9)                      # defect 8: they were stored as 0
    assert np.array_equal(read_events(tmp_path/'events.h5', 10**9+50_000, 10**9+60_000)['t']-10**9, e['t'][(e['t']>=50_000)&(e['t']<60_000)])

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
def test_duplicate_times_are_kept_in_the_files_order(tmp_path):
    e = make_events([3,1,2,1], [0,0,0,0], [5,5,5,9], [1,0,1,1])
    for kind in ('bin','dat','evt2','npy','text'): assert np.array_equal(read_events(any_file(tmp_path, kind, e)), e)

