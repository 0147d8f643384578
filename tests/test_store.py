"The packed store: what is in it, how it is opened, and how damage is told."
import json, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from mem_nb.events import make_events
from mem_nb.formats import read_events, write_events
from mem_nb.pack import Recording, Sample
from mem_nb import store
from mem_nb.store import EventStore, fingerprint, read_manifest, read_sources, write_part, write_store

@pytest.fixture
def sources(digits): return [Recording(p, p.parent.name, 'train' if i%4 else 'val') for i,p in enumerate(sorted(digits.glob('*/*.bin')))]

@pytest.fixture
def folder(sources, tmp_path):
    write_store(sources, tmp_path/'store', (34,34), workers=1)
    return tmp_path/'store'

def test_five_lines_of_numpy_read_the_store(folder):
    packed,index = np.memmap(folder/'train.events', dtype='<u8', mode='r'),np.load(folder/'train.npz')
    one = packed[index['starts'][7]:index['stops'][7]]
    ev = EventStore(folder).events(7)
    assert np.array_equal(one & 0xfff, ev['x']) and np.array_equal(one>>12 & 0xfff, ev['y']) and np.array_equal(one>>24 & 1, ev['p']) and np.array_equal(one>>25, ev['t'])

def test_sources_are_listed_with_hash_events_duration_and_sensor(folder, sources):
    import hashlib
    told = {s['name']:s for s in read_sources(folder)}
    assert len(told)==len(sources)
    for r in sources:
        events,s = read_events(r.path),told[f'{r.split}/{r.name}']
        assert s['sha256']==hashlib.sha256(r.path.read_bytes()).hexdigest() and s['sensor']==[34,34]
        assert (s['events'], s['first_us'], s['duration_us'])==(len(events), events['t'][0], events['t'][-1]-events['t'][0])

@pytest.mark.parametrize('at', [0, .3, .7, 1])
def test_one_flipped_bit_is_found_and_its_recording_named(folder, at):
    store = EventStore(folder)
    word = int(at*(len(store.packed)-1))
    with open(folder/'train.events', 'r+b') as f: f.seek(8*word+2); b = f.read(1)[0]; f.seek(8*word+2); f.write(bytes([b^4]))
    with pytest.raises(ValueError, match='recording .* is damaged, its checksum differs; remove .* prepare again') as e: EventStore(folder)
    r = np.searchsorted(store.offsets, word, 'right')-1
    assert f' {store.names[r]} ' in str(e.value)

def test_a_damaged_index_or_manifest_is_told(folder):
    npz = folder/'val.npz'; good = npz.read_bytes()
    npz.write_bytes(good[:-9] + b'\0' + good[-8:])
    with pytest.raises(ValueError, match='val.npz is missing or damaged'): EventStore(folder, 'val')
    (folder/'manifest.json').write_text('{"version"')
    with pytest.raises(ValueError, match='manifest.json: damaged'): EventStore(folder)
    (folder/'manifest.json').write_text('{"version": 2}')
    with pytest.raises(ValueError, match='version 2, this is 3; remove it and prepare again'): EventStore(folder)

def test_two_cameras_do_not_share_a_store(tmp_path):
    def source(name, sensor):
        (tmp_path/name).write_bytes(b'x')
        r = Recording(tmp_path/name, 'c', 'train', name, lambda *a, **k: iter([make_events([1],[1],[0],[1])]))
        object.__setattr__(r, 'open', lambda *a: (sensor, iter([tuple(np.array([v]) for v in (1,1,0,True))])))
        return r
    with pytest.raises(ValueError, match='two sensors in one store.*prepare each camera'):
        write_store([source('a', (34,34)), source('b', (180,240))], tmp_path/'store', workers=1)
    assert not (tmp_path/'store').exists() and not (tmp_path/'store.preparing').exists()

def test_first_events_beyond_another_files_sensor_are_noticed_before_packing(tmp_path, monkeypatch):
    def write(name, x, y, size=None):
        write_events(tmp_path/name, make_events([1,x],[1,y],[0,9],[0,1]), size)
        return Recording(tmp_path/name, 'c', 'train', name)
    sources = [write('a.bin', 3, 3), write('b.bin', 200, 100), write('c.dat', 3, 3, (34,34)), Recording(tmp_path/'gone.bin', 'c', 'train', 'gone')]
    assert write_store([sources[0],*sources[2:]], tmp_path/'sound', workers=1)['size']==[34,34]
    monkeypatch.setattr(store, 'write_split', lambda *a: pytest.fail('it packs'))
    with pytest.raises(ValueError, match=r'two sensors in one store: .*c.dat says \(H, W\) = \(34, 34\), .*b.bin has events up to \(101, 201\); prepare each'):
        write_store(sources, tmp_path/'store', workers=1)
    assert not list(tmp_path.glob('store*'))

def test_without_a_size_the_largest_coordinates_count(tmp_path):
    data = [(make_events([3,9],[1,2],[0,5],[1,0]), 0), (make_events([1],[7],[3],[1]), 0)]
    m = write_store([Sample(data, i, 'c', 'train') for i in range(2)], tmp_path/'store', workers=1)
    assert m['size']==[8,10] and m['events']==3

def test_two_processes_do_not_write_one_store(sources, tmp_path):
    code = f"import fcntl, time; f = open({str(tmp_path/'.store.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); f.write('4711'); f.flush(); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline()=='held\n'
        with pytest.raises(OSError, match='process 4711 is preparing .*wait for it'): write_store(sources, tmp_path/'store', (34,34), workers=1)
    finally: other.kill(); other.wait()
    write_store(sources, tmp_path/'store', (34,34), workers=1)   # the lock goes with its holder, however it ends

@pytest.mark.parametrize('end', ['', '.preparing', '.old'])
def test_nobodys_files_are_ever_removed(sources, tmp_path, end):
    mine = tmp_path/f'thesis{end}'; mine.mkdir()
    (mine/'chapter1.tex').write_text('hi'); (mine/'manifest.json').write_text('{}')
    with pytest.raises(ValueError, match='holds something that is no packed store, such as chapter1.tex'): write_store(sources, tmp_path/'thesis', (34,34), workers=1)
    assert (mine/'chapter1.tex').read_text()=='hi'

@pytest.mark.parametrize('at', ['before', 'old moved', 'new moved'])
def test_a_kill_in_the_final_swap_costs_nothing(sources, tmp_path, monkeypatch, at):
    import mem_nb.store as store
    write_store(sources[:30], tmp_path/'store', (34,34), workers=1)
    real,calls = os.replace,[]
    def dies(a, b):
        if Path(a).name.endswith('.part'): return real(a, b)
        calls.append(a)
        if at=='before' or (at=='old moved' and len(calls)==2): raise KeyboardInterrupt
        real(a, b)
        if at=='new moved' and len(calls)==2: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(store.os, 'replace', dies)
        with pytest.raises(KeyboardInterrupt): write_store(sources, tmp_path/'store', (34,34), workers=1)
    packed = []
    monkeypatch.setattr(store, 'write_split', lambda *a: packed.append(a))
    if at!='new moved': write_store(sources, tmp_path/'store', (34,34), workers=1)
    assert not packed and EventStore(tmp_path/'store').manifest['recordings']==len(sources)

def test_events_beyond_the_sensor_that_another_file_names_are_an_error(tmp_path):
    far = (make_events([50],[60],[0],[1]), 0)
    named = Recording(tmp_path/'a', 'c', 'train', 'a')
    object.__setattr__(named, 'open', lambda *a: ((34,34), iter([tuple(np.array([v]) for v in (1,1,0,True))])))
    (tmp_path/'a').write_bytes(b'x')
    with pytest.raises(ValueError, match=r'c/0000000 has events up to .*\(61, 51\), beyond the sensor \(34, 34\) that train/c/a tells of'):
        write_store([named, Sample([far], 0, 'c', 'train')], tmp_path/'store', workers=1)

def test_leftovers_of_other_settings_are_not_taken_for_good(sources, tmp_path):
    write_store(sources, tmp_path/'a', (34,34), workers=1)
    os.rename(tmp_path/'a', tmp_path/'b.preparing')
    m = write_store(sources[:20], tmp_path/'b', (34,34), workers=1)
    assert m['recordings']==20 and EventStore(tmp_path/'b').damaged()==[]


def test_parts_that_are_packed_apart_make_the_same_store_whatever_kills_them(sources, folder, tmp_path):
    seen,how = fingerprint(sources, (34,34), None, None),((34,34), None, None)
    for k in (2,1,3): write_part(sources, tmp_path/'apart', k, 3, seen, *how, workers=1)
    place = tmp_path/'apart.parts'/'00002-of-00003'
    (place/'whole').unlink()
    with pytest.raises(ValueError, match='1 of 3 parts are not packed whole, .*00002-of-00003; run their jobs again, or remove .*parts'):
        write_store(sources, tmp_path/'apart', (34,34), workers=1, seen=seen)
    notes = sorted(place.glob('train-*.json'))
    notes[-1].unlink()                                          # killed before it was noted
    write_part(sources, tmp_path/'apart', 2, 3, seen, *how, workers=1)
    write_store(sources, tmp_path/'apart', (34,34), workers=1)
    assert {p.name for p in (tmp_path/'apart').iterdir()}=={p.name for p in folder.iterdir()} and not place.parent.exists()
    for p in folder.iterdir(): assert p.read_bytes()==(tmp_path/'apart'/p.name).read_bytes(), p.name

@pytest.mark.parametrize('at', [1, 3, 5])
def test_a_kill_while_parts_are_joined_costs_nothing(sources, folder, tmp_path, monkeypatch, at):
    seen = fingerprint(sources, (34,34), None, None)
    for k in (1,2,3): write_part(sources, tmp_path/'apart', k, 3, seen, (34,34), None, None, workers=1)
    whole,calls = store.write_whole,[]
    def dies(path, text):
        if path.name.startswith(('train-','val-')): calls.append(path)
        if len(calls)==at: raise KeyboardInterrupt
        whole(path, text)
    monkeypatch.setattr(store, 'write_whole', dies)
    with pytest.raises(KeyboardInterrupt): write_store(sources, tmp_path/'apart', (34,34), workers=1)
    monkeypatch.setattr(store, 'write_whole', whole)
    write_store(sources, tmp_path/'apart', (34,34), workers=1)
    for p in folder.iterdir(): assert p.read_bytes()==(tmp_path/'apart'/p.name).read_bytes(), p.name

def test_parts_of_other_recordings_are_not_joined(sources, tmp_path):
    for k in (1,2): write_part(sources, tmp_path/'apart', k, 2, 'other', (34,34), None, None, workers=1)
    with pytest.raises(ValueError, match='2 of 2 parts are not packed whole, or of other recordings'): write_store(sources, tmp_path/'apart', (34,34), workers=1)

def test_two_sensors_are_an_error_before_packing_that_names_both_files(tmp_path, monkeypatch):
    e,recs = make_events([1,2],[3,4],[0,5],[1,0]),[]
    for name,sensor in (('a.dat',(240,304)), ('b.npy',None), ('c.raw',None), ('d.raw',(480,640)), ('e.h5',(240,304))):
        write_events(tmp_path/name, e, sensor); recs.append(Recording(tmp_path/name, 'c', 'train', name))
    packed = []
    monkeypatch.setattr(store, 'write_split', lambda *a: packed.append(a))
    for write in (lambda: write_store(recs, tmp_path/'store', workers=1), lambda: write_part(recs, tmp_path/'store', 1, 1, 'seen', None, None, None, workers=1)):
        with pytest.raises(ValueError, match=r'two sensors in one store: \S*a\.dat says .*240, 304.* \S*d\.raw says .*480, 640.*; prepare each camera'): write()
    assert not packed and not list(tmp_path.glob('store*'))
    monkeypatch.undo()
    (tmp_path/'d.raw').write_bytes(b'% evt 2.0\n% geometry 640x480\n')          # what cannot be read is refused, as ever; its header counts
    with pytest.raises(ValueError, match='two sensors'): write_store(recs, tmp_path/'store', workers=1)
    m = write_store([*recs[:3], recs[4]], tmp_path/'store', workers=1)
    assert m['size']==[240,304] and m['recordings']==4
    m = write_store(recs, tmp_path/'known', size=(240,304), workers=1)          # where the sensor is known, the file that disagrees is refused
    assert m['recordings']==4 and 'd.raw' in m['refused'][0]['reason'] and '640' in m['refused'][0]['reason']
