"Readers: parity with the original, real recordings, and a helpful word about every broken file."
import os, numpy as np, pytest
from pathlib import Path
from mem_nb import formats
from mem_nb.events import EVENT_DTYPE, make_events
from mem_nb.formats import (EventFileError, FORMATS, event_chunks, file_format, read_bin, read_dat, read_events, read_npy, read_npz, read_text,
                            recording_size, sensor_size, write_bin, write_events)

SHARED = Path(__file__).parents[2]/'shared'

def random_events(n=3000, size=(240,240), span=2**23, seed=0):
    rng = np.random.default_rng(seed)
    return make_events(rng.integers(0,size[1],n), rng.integers(0,size[0],n), np.sort(rng.integers(0,span,n)), rng.integers(0,2,n))

def dat_bytes(e, kind=0, header=b'% Data file\n% Version 2\n'):
    r = np.empty((len(e),2), '<u4')
    r[:,0] = e['t']; r[:,1] = e['x'].astype('u4') | e['y'].astype('u4')<<14 | e['p'].astype('u4')<<28
    return header + bytes([kind,8]) + r.tobytes()

def write_all(folder, e):
    "The same events in every format; returns the files."
    for suffix in ('bin','raw','h5'): write_events(folder/f'a.{suffix}', e)
    (folder/'a.dat').write_bytes(dat_bytes(e))
    np.savez(folder/'a.npz', event_data=e)
    np.savez_compressed(folder/'b.npz', **{k:e[k] for k in 'xytp'})
    np.save(folder/'a.npy', e)
    rows = np.stack([e['x'], e['y'], e['t'], e['p']], 1)
    np.save(folder/'b.npy', rows.astype(float)); np.save(folder/'c.npy', rows.astype(float)*[1,1,1,2]-[0,0,0,1])
    np.savetxt(folder/'a.txt', rows[:,[2,0,1,3]], fmt='%d'); np.savetxt(folder/'a.csv', rows[:,[2,0,1,3]], fmt='%d', delimiter=',', header='t x y p')
    np.savetxt(folder/'b.txt', np.stack([e['t']/1e6, e['x'], e['y'], e['p']], 1), fmt='%.6f %d %d %d')
    return sorted(folder.iterdir())

def refusal(path):
    with pytest.raises(EventFileError) as e: read_events(path)
    assert Path(path).name in str(e.value)                           # every message names the file
    return str(e.value)

# ---- parity with the original
def golden(name):
    path = SHARED/'golden'/f'{name}.npz'
    if not path.exists(): pytest.skip(f'no {name}.npz in shared/golden')
    return np.load(path)

@pytest.mark.parametrize('name,suffix,reader', [('decode_ncaltech_bin','.bin',read_bin), ('decode_ncars_dat','.dat',read_dat)])
def test_decodes_as_the_original(name, suffix, reader, tmp_path):
    "Also defect 3: the polarity 0/1 of N-Cars becomes a bool, as the -1/+1 of N-Caltech101 does."
    g = golden(name); path = tmp_path/f'g{suffix}'; path.write_bytes(g['raw'].tobytes())
    e = reader(path)
    for k,want in zip('xyt', g['events'].T): assert (e[k]==want).all()
    assert (e['p']==(g['events'][:,3]>0)).all() and 0<e['p'].mean()<1
    assert (read_events(path)==e).all()

def test_writes_the_bytes_of_the_original(tmp_path):
    g = golden('decode_ncaltech_bin'); (tmp_path/'a.bin').write_bytes(g['raw'].tobytes())
    write_bin(tmp_path/'b.bin', read_bin(tmp_path/'a.bin'))
    assert (tmp_path/'b.bin').read_bytes()==g['raw'].tobytes()

# ---- real recordings
@pytest.mark.parametrize('name,n,size', [('ncars_sample/tonic_sample_ncars.dat',2009,(42,78)), ('davis240_slider_txt/slider_seg.txt',50_000,None),
                                         ('ncaltech101_sample/Faces_easy/image_0001.bin',67_445,(173,151)), ('dvs_gesture_sample/01_hand_clapping.bin',63_471,None)])
def test_real_recordings(name, n, size):
    path = SHARED/'recordings'/name
    if not path.exists(): pytest.skip(f'no {name}')
    e = read_events(path)
    assert len(e)==n and e.dtype==EVENT_DTYPE and (np.diff(e['t'])>=0).all() and .2<e['p'].mean()<.8
    if size: assert (e['y'].max()+1, e['x'].max()+1)==size

def test_real_nmnist():
    files = sorted((SHARED/'recordings'/'nmnist').rglob('*.bin'))[::40]
    if not files: pytest.skip('no N-MNIST')
    for f in files:
        e = read_events(f)
        assert e['x'].max()<34 and e['y'].max()<34 and 250_000<e['t'][-1]<350_000 and len(e)*5==f.stat().st_size

@pytest.mark.parametrize('name,n,size', [('aedat4/tonic_sample_320x240.aedat4',111_954,(240,320)), ('prophesee_raw/expelliarmus_evt2_sample.raw',539_481,None),
                                         ('prophesee_raw/expelliarmus_evt3_sample.raw',219_596,None)])
def test_real_cameras(name, n, size, shared):
    path = shared/'recordings'/name
    if 'aedat4' in name: pytest.importorskip('aedat')
    e = read_events(path); assert len(e)==n and recording_size(path)==size and (np.diff(e['t'])>=0).all()
    mid = int(e['t'][n//2]); assert (read_events(path, mid, mid+500)==e[(e['t']>=mid)&(e['t']<mid+500)]).all()
    if 'evt3' in name:
        other = np.load(path.with_suffix('.npy')); assert all((e[k]==other[k]).all() for k in 'xyp')

def test_evt3_as_another_decoder(shared):
    evt3 = pytest.importorskip('evt3')
    path = shared/'recordings'/'prophesee_raw'/'expelliarmus_evt3_sample.raw'
    e,other = read_events(path),evt3.decode_file(str(path))
    assert all((e[k]==getattr(other, k)).all() for k in 'xytp')

# ---- laws
def test_every_format_gives_the_same_events(tmp_path):
    e = random_events()
    files = write_all(tmp_path, e)
    assert {file_format(f) for f in files}==set(FORMATS)-{'evt21','evt3','aedat4'}
    for f in files: assert (read_events(f)==e).all(), f.name

def test_content_wins_over_the_extension(tmp_path):
    e = random_events(200)
    for f in write_all(tmp_path, e):
        if file_format(f) in ('bin','text'): continue
        g = f.rename(f.with_suffix('.bin')); assert (read_events(g)==e).all()

def test_a_bin_that_begins_with_a_percent_sign_is_a_bin(tmp_path):
    e = random_events(50); e['x'][0] = ord('%'); e['y'][:] = ord('\n'); write_bin(tmp_path/'a.bin', e)
    assert (read_events(tmp_path/'a.bin')==e).all()

def test_corners_of_the_5_bytes(tmp_path):
    e = make_events([0,255,0,255], [0,0,255,255], [0,0,2**23-1,2**23-1], [0,1,0,1])
    write_bin(tmp_path/'a.bin', e); assert (read_bin(tmp_path/'a.bin')==e).all()

@pytest.mark.parametrize('n', [2**15-1, 2**15, 2**15+1, 2**16+5])
def test_pieces_join_without_a_seam(tmp_path, n):
    e = random_events(n); write_bin(tmp_path/'a.bin', e); (tmp_path/'a.dat').write_bytes(dat_bytes(e))
    assert (read_bin(tmp_path/'a.bin')==e).all() and (read_dat(tmp_path/'a.dat')==e).all()

def test_dat_keeps_all_its_bits(tmp_path):
    e = make_events([0,2**14-1], [2**14-1,0], [0,2**32-1], [1,0])
    for kind in (0,12):
        (tmp_path/'a.dat').write_bytes(dat_bytes(e, kind)); assert (read_events(tmp_path/'a.dat')==e).all()

@pytest.mark.parametrize('line,us', [('1468940293.123456 1 2 1',1468940293123456), ('0.000001 1 2 0',1), ('12 1 2 1',12), ('3.5,1,2,-1',3_500_000)])
def test_text_seconds_and_microseconds(tmp_path, line, us):
    (tmp_path/'a.txt').write_text(f'# made by hand\n{line}\n')
    e = read_text(tmp_path/'a.txt'); assert e['t'][0]==us and (e['x'][0],e['y'][0])==(1,2)

@pytest.mark.parametrize('heading,order,sep', [('timestamp,x,y,polarity','txyp',','), ('x, y, p, t','xypt',','), ('"x","y","t","p"','xytp',','), ('t x y p','txyp',' '), ('# made by hand\n\nts\tx\ty\tpol','txyp','\t')])
@pytest.mark.parametrize('mark', ['', '\ufeff'])
def test_a_heading_says_the_order_of_the_columns(tmp_path, heading, order, sep, mark):
    e = random_events(70_000)
    rows = sep.join(['%d']*4)
    (tmp_path/'a.csv').write_text(mark + heading + '\n' + '\n'.join(rows % tuple(v) for v in zip(*(e[k].astype(int) for k in order))), encoding='utf-8')
    assert (read_events(tmp_path/'a.csv')==e).all()

def test_path_may_be_a_string(tmp_path):
    write_bin(str(tmp_path/'a.bin'), random_events(9)); assert len(read_events(str(tmp_path/'a.bin')))==9

# ---- bad input
@pytest.mark.parametrize('cut', [1,2,3,4])
def test_a_truncated_bin_is_refused(tmp_path, cut):
    "Defect 8: it gave a garbage event."
    write_bin(tmp_path/'a.bin', random_events()); raw = (tmp_path/'a.bin').read_bytes(); (tmp_path/'a.bin').write_bytes(raw[:-cut])
    assert f'{5-cut} are left over at byte 14995' in refusal(tmp_path/'a.bin')

def test_a_truncated_dat_is_refused(tmp_path):
    (tmp_path/'a.dat').write_bytes(dat_bytes(random_events(10))[:-3]); assert 'truncated' in refusal(tmp_path/'a.dat')

@pytest.mark.parametrize('name', ['a.bin','a.dat','a.npz','a.npy','a.txt','a.csv'])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path/name).touch(); assert 'no events' in refusal(tmp_path/name)

def test_no_events_in_a_sound_file(tmp_path):
    none = random_events(5)[:0]
    np.save(tmp_path/'a.npy', none); np.savez(tmp_path/'a.npz', event_data=none)
    (tmp_path/'a.dat').write_bytes(dat_bytes(none)); (tmp_path/'a.txt').write_text('# nothing\n')
    for f in tmp_path.iterdir(): assert 'no events' in refusal(f)

def test_times_that_run_backwards_name_the_event_in_every_format(tmp_path):
    e = random_events(); e['t'][1234] = 0; e['t'][0] = 1
    np.save(tmp_path/'a.npy', e); (tmp_path/'a.dat').write_bytes(dat_bytes(e))
    for f in tmp_path.iterdir(): assert 'times run backwards at event 1, ' not in refusal(f) and 'at event 1234' in refusal(f)

def test_columns_in_another_order_are_noticed(tmp_path):
    e = random_events(); rows = np.stack([e['t'], e['x'], e['y'], e['p']], 1)
    np.save(tmp_path/'a.npy', rows); assert 'in the order x, y, t, p?' in refusal(tmp_path/'a.npy')
    np.savetxt(tmp_path/'a.txt', rows[:,[1,2,0,3]], fmt='%d'); assert 'each line t x y p?' in refusal(tmp_path/'a.txt')

@pytest.mark.parametrize('text,words', [('1 2 3\n','not lines of four'), ('1 2 3 1\nx y z\n','not lines of four'), ('1 2 3 1\n5 2 3\n','not lines of four'), ('nan 2 3 1\n','t = nan')])
def test_text_that_is_none(tmp_path, text, words):
    (tmp_path/'a.txt').write_text(text); assert words in refusal(tmp_path/'a.txt')

def test_nothing_is_ever_unpickled(tmp_path):
    "Defect 16, for events: a pickle can run code."
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'boom'),)
    np.save(tmp_path/'a.npy', np.array([Bomb()], object), allow_pickle=True); np.savez(tmp_path/'a.npz', event_data=np.array([Bomb()], object))
    for name in ('a.npy','a.npz'): assert 'without objects' in refusal(tmp_path/name)
    assert not (tmp_path/'boom').exists()

@pytest.mark.parametrize('name,raw,words', [('a.npz',b'PK\x03\x04garbage','cannot be read as'), ('a.npy',b'\x93NUMPY\x01\x00','cannot be read as'),
    ('a.bin',b'<!DOCTYPE html>','a web page'), ('a.jpg',b'\xff\xd8\xff\xe0','JPEG'), ('a.h5',b'\x89HDF\r\n','cannot be read as hdf5'), ('readme.md',b'hello there','extension'),
    ('a.bin',b'version https://git-lfs.github.com/spec/v1\n','Git LFS pointer'), ('a.dat',b'no header','extension'), ('a.dat',b'% evt 4.0\n% end\n\x01\x02','Prophesee')])
def test_foreign_files_are_named(tmp_path, name, raw, words):
    (tmp_path/name).write_bytes(raw); assert words in refusal(tmp_path/name)

def test_files_that_are_not_there(tmp_path):
    assert 'no such file' in refusal(tmp_path/'a.bin')
    (tmp_path/'folder.bin').mkdir(); assert 'no such file' in refusal(tmp_path/'folder.bin')

def test_an_npz_without_events_says_what_it_holds(tmp_path):
    np.savez(tmp_path/'a.npz', image=np.zeros(3), label=1); assert 'found image, label' in refusal(tmp_path/'a.npz')
    np.savez(tmp_path/'b.npz', x=[1], y=[1], t=[1,2], p=[1]); assert 'equally long' in refusal(tmp_path/'b.npz')

def test_damage_gives_a_message_or_events_and_nothing_else(tmp_path):
    "Files with flipped, missing and added bytes: a reader answers with events or with an EventFileError."
    rng = np.random.default_rng(0)
    for f in write_all(tmp_path, random_events(60)):
        raw = np.frombuffer(f.read_bytes(), np.uint8)
        for k in range(40):
            bad = raw.copy(); where = rng.integers(0, min(len(bad), [40,len(bad)][k%2]), 3); bad[where] = rng.integers(0,256,3)
            bad = [bad, bad[:rng.integers(1,len(bad))], np.append(bad, rng.integers(0,256,7))][k%3].astype(np.uint8)
            f.write_bytes(bad.tobytes())
            try: e = read_events(f)
            except EventFileError as err: assert f.name in str(err)
            else: assert e.dtype==EVENT_DTYPE and len(e)

# ---- writing
@pytest.mark.parametrize('event,words', [((256,0,0,1),'x = 256'), ((0,300,0,1),'y = 300'), ((-1,0,0,1),'x = -1'), ((0,0,2**23,1),'23 bits'), ((0,0,-4,1),'-4 µs')])
def test_write_bin_refuses_what_does_not_fit(tmp_path, event, words):
    with pytest.raises(EventFileError, match=words): write_bin(tmp_path/'a.bin', np.array([event], EVENT_DTYPE))
    assert not list(tmp_path.iterdir())

def test_write_bin_refuses_no_events(tmp_path):
    with pytest.raises(EventFileError, match='no events'): write_bin(tmp_path/'a.bin', random_events(3)[:0])

def test_a_write_that_fails_leaves_no_file_of_that_name(tmp_path, monkeypatch):
    write_bin(tmp_path/'a.bin', random_events(7)); before = (tmp_path/'a.bin').read_bytes()
    def full(*a): raise OSError('No space left on device')
    monkeypatch.setattr(formats.os, 'replace', full)
    with pytest.raises(OSError): write_bin(tmp_path/'a.bin', random_events(8))
    with pytest.raises(OSError): write_bin(tmp_path/'b.bin', random_events(8))
    assert (tmp_path/'a.bin').read_bytes()==before and not (tmp_path/'b.bin').exists()

@pytest.mark.parametrize('fortran', [False, True])
def test_rows_that_are_cut_are_refused_and_a_window_before_the_cut_is_read(tmp_path, fortran):
    e = random_events(500); rows = np.stack([e['x'],e['y'],e['t'],e['p']], 1)
    np.save(tmp_path/'a.npy', np.asfortranarray(rows) if fortran else rows)
    (tmp_path/'a.npy').write_bytes((tmp_path/'a.npy').read_bytes()[:-3])
    said = refusal(tmp_path/'a.npy'); assert f'after {0 if fortran else 499} whole events' in said and 'promises' in said
    if not fortran:
        before = e[e['t']<e['t'][300]]
        assert np.array_equal(read_events(tmp_path/'a.npy', 0, int(e['t'][300])), before) and np.array_equal(read_events(tmp_path/'a.npy', int(e['t'][100]), int(e['t'][300])), before[before['t']>=e['t'][100]])
        with pytest.raises(EventFileError, match='promises'): read_events(tmp_path/'a.npy', int(e['t'][300]))

def test_the_first_fault_is_told_whatever_its_column(tmp_path):
    e = random_events(500); e['t'][200],e['x'][300] = -1,-5; np.save(tmp_path/'a.npy', e)
    assert 'times run backwards at event 200' in refusal(tmp_path/'a.npy')
