"Damaged files of every format: each is decoded to sound events, or refused with an EventFileError that names it."
from collections import Counter
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from mem_nb.events import EVENT_DTYPE, check_events, make_events
from mem_nb.formats import FORMATS, EventFileError, event_chunks, read_events, write_events

COUNTS = {name:Counter() for name in FORMATS}   # told at the end of the run, by conftest

def small(folder, name):
    "A sound file of 40 events."
    rng = np.random.default_rng(0)
    e = make_events(rng.integers(0,64,40), rng.integers(0,48,40), np.sort(rng.integers(0,9000,40)), rng.integers(0,2,40))
    suffix = dict(evt2='.raw', hdf5='.h5', bin='.bin', dat='.dat', npy='.npy').get(name)
    if suffix:
        if name=='hdf5': pytest.importorskip('h5py')
        path = folder/f'a{suffix}'; write_events(path, e, (48,64)); return path
    path = folder/f"a.{dict(evt21='raw', evt3='raw', text='txt').get(name, name)}"
    if name=='npz': np.savez_compressed(path, **{k:e[k] for k in 'xytp'})
    if name=='text': np.savetxt(path, np.stack([e['t'],e['x'],e['y'],e['p']], 1), fmt='%d')
    if name=='evt3': path.write_bytes(b'% evt 3.0\n% geometry 64x48\n% end\n' + np.array([0x8001,0x6007,0x0005,0x2805,0x3804,0x4003,0x5081,0x6009,0x2006]*5, '<u2')[:9].tobytes())
    if name=='evt21': path.write_bytes(b'% evt 2.1\n% geometry 64x48\n% end\n' + np.array([8<<60|1<<32, 1<<60|3<<54|4<<43|5<<32|0b1001, 7<<54|9<<43|6<<32|1], '<u8').tobytes())
    if name=='aedat4':
        faery = pytest.importorskip('faery'); pytest.importorskip('aedat')
        a = np.empty(40, faery.EVENTS_DTYPE)
        for k,field in zip('xytp', ('x','y','t','on')): a[field] = e[k]
        faery.events_stream_from_array(a, (64,48)).to_file(path)
    return path

def attempt(path, name):
    try: e = read_events(path)
    except EventFileError as err:
        COUNTS[name]['refused'] += 1; assert path.name in str(err)
        if COUNTS[name]['refused']%5==0:                                          # the other door; every fifth, for the time it takes
            with pytest.raises(EventFileError): list(event_chunks(path, 7))
    else:
        COUNTS[name]['decoded'] += 1; assert e.dtype==EVENT_DTYPE and len(e); check_events(e)
        parts = list(event_chunks(path, 7)); assert max(map(len, parts))<=7 and (np.concatenate(parts)==e).all()

@pytest.mark.parametrize('name', FORMATS)
def test_damaged_files(name, tmp_path):
    path = small(tmp_path, name); raw = np.fromfile(path, np.uint8); rng = np.random.default_rng(1)
    assert len(read_events(path))
    tries = 6 if name=='aedat4' else 60                                       # a process each
    cuts = np.linspace(1, len(raw)-1, tries).astype(int) if name=='aedat4' else range(len(raw))   # every length there is
    bad = [raw[:k] for k in cuts]
    for k in range(tries*2):
        b = raw.copy(); at = rng.integers(0, [len(b), min(len(b),120)][k%2], 1+k%4); b[at] ^= (1<<rng.integers(0,8,len(at))).astype(np.uint8); bad.append(b)
    bad += [rng.integers(0,256,rng.integers(1,300)).astype(np.uint8) for _ in range(tries)]
    for b in bad: path.write_bytes(b.tobytes()); attempt(path, name)

damage = st.one_of(st.tuples(st.just('flip'), st.integers(0,2**16), st.integers(0,7)), st.tuples(st.just('set'), st.integers(0,2**16), st.integers(0,255)),
                   st.tuples(st.just('drop'), st.integers(0,2**16), st.integers(1,9)), st.tuples(st.just('add'), st.integers(0,2**16), st.integers(1,9)))

@pytest.mark.parametrize('name', [n for n in FORMATS if n!='aedat4'])
def test_damage_that_hypothesis_finds(name, tmp_path):
    path = small(tmp_path, name); sound = path.read_bytes()
    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(st.lists(damage, min_size=1, max_size=4))
    def run(steps):
        b = bytearray(sound)
        for what,at,k in steps:
            at %= max(len(b),1)
            if what=='drop': del b[at:at+k]
            elif what=='add': b[at:at] = b[:k]
            elif b: b[at] = b[at]^1<<k if what=='flip' else k
        path.write_bytes(b); attempt(path, name)
    run()

@pytest.mark.parametrize('suffix', ['.bin','.dat','.raw','.h5','.npy','.npz','.txt','.csv','.aedat4'])
@pytest.mark.parametrize('raw', [b'\x89PNG\r\n\x1a\n'+bytes(90), b'<html>no</html>', b'{"a": 1}', bytes(range(256))*3, b'%PDF-1.7\n', b'\x7fELF'+bytes(99)])
def test_foreign_files_with_the_right_extension(raw, suffix, tmp_path):
    path = tmp_path/f'a{suffix}'; path.write_bytes(raw)
    name = {'.raw':'evt2','.h5':'hdf5','.txt':'text','.csv':'text'}.get(suffix, suffix[1:]); attempt(path, name)

def test_headers_that_lie(tmp_path):
    for shape in ((10**12,), (10**12,4)):
        with open(tmp_path/'a.npy', 'wb') as f:
            np.lib.format.write_array_header_1_0(f, dict(descr=np.lib.format.dtype_to_descr(EVENT_DTYPE) if len(shape)==1 else '<f8', fortran_order=False, shape=shape)); f.write(bytes(130))
        with pytest.raises(EventFileError, match='promises'): read_events(tmp_path/'a.npy')
