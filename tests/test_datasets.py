"Data sets: every layout that is published, split lists, windows, other people's samples."
import json, shutil
from pathlib import Path
import numpy as np, pytest
from mem_nb.config import parse_config
from mem_nb.datasets import DATASETS, Dataset, list_recordings, prepare, prepare_samples, prepared, read_split, store_path
from mem_nb.events import make_events
from mem_nb.formats import write_bin, write_events
from mem_nb.batches import batch_events
from mem_nb.frames import histogram
from mem_nb.pipeline import command
from mem_nb.store import EventStore, read_manifest, read_sources

def events(n=200, seed=0, size=(34,34), span=300_000):
    rng = np.random.default_rng(seed)
    return make_events(rng.integers(0, size[1], n), rng.integers(0, size[0], n), np.sort(rng.integers(0, span, n)), rng.integers(0, 2, n))

def fill(root, names, size=(34,34), write=write_events):
    for i,name in enumerate(names):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        write(root/name, events(seed=i, size=size))

def conf(root, tmp_path, data_set, more=''): return parse_config(f'data_path = {root}\ndata_set = {data_set}\nruns_dir = {tmp_path}\nprepare_workers = 1\n{more}')

def save_nimagenet(path, e):
    a = np.empty(len(e), [('x','<u2'),('y','<u2'),('t','<i8'),('p','u1')])
    for k in 'xytp': a[k] = e[k]
    np.savez_compressed(path, event_data=a)

def save_gesture(path, e): np.save(path, np.stack([e['x'], e['y'], e['p'], e['t']//1000], 1).astype(float))

LAYOUTS = dict(
    nmnist=(['Train/0/1.bin','Train/1/2.bin','Test/0/3.bin','Test/1/4.bin'], (34,34), write_events),
    ncars=(['n-cars_train/cars/obj_1_td.dat','n-cars_train/background/obj_2_td.dat','n-cars_test/cars/obj_3_td.dat','n-cars_test/background/obj_4_td.dat'], (100,120), write_events),
    nimagenet=([f'extracted_{s}/{c}/{c}_{i}.npz' for i,s in enumerate(('train','val')) for c in ('n01440764','n01443537')], (480,640), save_nimagenet),
    ncaltech101=([f'{c}/image_{i:04d}.bin' for c in ('ant','elephant') for i in range(1,6)], (180,240), write_events))

@pytest.mark.parametrize('name', LAYOUTS)
def test_published_layouts(name, tmp_path):
    names,size,write = LAYOUTS[name]
    fill(tmp_path/'raw', names, size, write)
    folder = prepare(conf(tmp_path/'raw', tmp_path, name))
    train,val = EventStore(folder),EventStore(folder, 'val')
    assert train.size==size and len(train)+len(val)==len(names) and len(val)>0 and train.classes==sorted({n.split('/')[-2] for n in names})
    assert int(train.offsets[-1]+val.offsets[-1])==200*len(names) and not train.manifest['refused']

@pytest.mark.parametrize('names,write', [
    ([f'ibmGesture{s}/user0{u}_led/{k}.npy' for s,u in (('Train',1),('Train',2),('Test',3)) for k in (0,3,10)], save_gesture),
    ([f'{k:02d}_{c}.bin' for k,c in enumerate(('hand_clapping','air_drums'), 1)], write_events)])
def test_dvs_gesture_as_tonic_keeps_it_and_as_files_named_by_class(names, write, tmp_path):
    fill(tmp_path/'raw', names, (128,128), write)
    store = EventStore(prepare(conf(tmp_path/'raw', tmp_path, 'dvsgesture')))
    assert store.size==(128,128) and store.classes==(['0','10','3'] if 'npy' in names[0] else ['air_drums','hand_clapping'])
    e = store.events(0)
    assert e['t'].max()>1000 and 0<e['p'].mean()<1      # milliseconds became µs

def test_dsec_events_are_cut_into_windows_and_named_after_their_sequence(tmp_path):
    pytest.importorskip('h5py')
    for i,split in enumerate(('train','train','test')): fill(tmp_path/'raw'/split/f'city_{i}'/'events'/'left', ['events.h5'], (480,640))
    store = EventStore(prepare(conf(tmp_path/'raw', tmp_path, 'dsec', 'window_us = 50000')))
    assert store.size==(480,640) and set(store.names)=={f'city_{i}/events/left/events.h5' for i in (0,1)} and (store.labels==-1).all()
    assert len(store)==12 and max(store.events(i)['t'].ptp() if hasattr(np.ndarray, 'ptp') else np.ptp(store.events(i)['t']) for i in range(12))<50_000

@pytest.mark.parametrize('more,spans', [('slice_max_evs = 80', None), ('slice_max_evs = 80\nwindow_overlap = 0.5', None), ('window_us = 60000', 60_000), ('window_us = 60000\nwindow_overlap = 0.5', 60_000)])
def test_unlabelled_recordings_by_count_and_by_time_with_overlap(tmp_path, more, spans):
    fill(tmp_path/'raw', ['a.npy','deep/b.bin','deep/c.txt.npy','d.dat'])
    cfg = conf(tmp_path/'raw', tmp_path, 'recordings', more + '\nval_fraction = 0')
    store = EventStore(prepare(cfg))
    assert set(store.names)=={'a.npy','deep/b.bin','deep/c.txt.npy','d.dat'} and int(store.offsets[-1])==800
    covered = np.zeros(800, int)
    for a,b in zip(store.starts, store.stops): covered[a:b] += 1
    assert (covered>=1).all() and (covered==1).all()==('overlap' not in more)
    if spans: assert all(np.ptp(store.events(i)['t'])<spans for i in range(len(store)))
    else: assert (store.stops-store.starts).max()==80
    assert len(read_manifest(store.folder)['samples'])==2

def test_another_window_is_another_store(tmp_path):
    fill(tmp_path/'raw', ['a.npy','b.npy'])
    paths = {store_path(conf(tmp_path/'raw', tmp_path, 'recordings', more)) for more in ('', 'window_us = 1000', 'window_us = 1000\nwindow_overlap = .5', 'slice_max_evs = 77')}
    assert len(paths)==4

# ---- splits
def test_the_published_split_lists_are_read_as_they_are(shared, tmp_path):
    listed = read_split(shared/'original_configs'/'splits'/'ncaltech101.txt')
    splits = [s for s,_ in listed.values()]
    assert (splits.count('train'), splits.count('val'))==(7002, 1707)
    chosen = [k for k in listed if k.startswith(('ant/','elephant/'))]
    fill(tmp_path/'raw', [f'{k}.bin' for k in chosen] + ['BACKGROUND_Google/image_0001.bin'], (180,240), lambda p,e: write_bin(p, e[:20]))
    (tmp_path/'two.txt').write_text('\n'.join(f'{listed[k][0]}/{k}.npy' for k in chosen))
    m = read_manifest(prepare(conf(tmp_path/'raw', tmp_path, 'ncaltech101', f'split_file = {tmp_path}/two.txt')))
    assert m['classes']==['ant','elephant'] and m['recordings']==len(chosen)

def test_defect_1_a_stratified_split_is_drawn_by_seed_and_every_class_is_in_both(tmp_path, capsys):
    fill(tmp_path/'raw', [f'{c}/{i}.bin' for c in ('ant','antelope','elephant') for i in range(10)])
    draw = lambda seed: list_recordings(tmp_path/'raw', DATASETS['ncaltech101'], seed=seed)
    one = draw(0)
    assert one==draw(0)!=draw(1)
    for c in ('ant','antelope','elephant'):
        assert sum(r.split=='val' and r.label==c for r in one)==2 and all(r.path.parent.name==r.label for r in one)

def test_files_that_the_list_leaves_out_are_told(tmp_path, capsys):
    fill(tmp_path/'raw', ['a/1.bin','a/2.bin','a/3.bin'])
    (tmp_path/'s.txt').write_text('train/a/1.npy\nval/a/3.npy\n')
    assert len(list_recordings(tmp_path/'raw', DATASETS['folder'], tmp_path/'s.txt'))==2
    assert '1 recordings' in capsys.readouterr().out

# ---- sensors
def test_a_sensor_that_contradicts_the_data_set_is_an_error(tmp_path):
    fill(tmp_path/'raw', ['Train/0/1.bin','Test/0/2.bin'])
    with pytest.raises(ValueError, match='sensor_H and sensor_W say .*nmnist has a sensor of'): prepare(conf(tmp_path/'raw', tmp_path, 'nmnist', 'sensor_H = 180\nsensor_W = 240'))

def test_a_header_that_contradicts_is_refused_by_name(tmp_path):
    fill(tmp_path/'raw', ['c/1.bin','c/2.bin','c/3.bin'])
    write_events(tmp_path/'raw'/'c'/'4.dat', events(), (240,304))
    m = read_manifest(prepare(conf(tmp_path/'raw', tmp_path, 'folder', 'sensor_H = 34\nsensor_W = 34')))
    assert len(m['refused'])==1 and '4.dat' in m['refused'][0]['reason'] and '304' in m['refused'][0]['reason']

# ---- idempotence
def test_later_steps_do_not_need_the_raw_files(tmp_path):
    fill(tmp_path/'raw', ['c/1.bin','c/2.bin','c/3.bin'])
    cfg = conf(tmp_path/'raw', tmp_path, 'folder')
    folder = prepare(cfg); shutil.rmtree(tmp_path/'raw')
    assert prepared(cfg)==folder
    cfg.data.val_fraction = .5
    with pytest.raises(FileNotFoundError, match='no data folder'): prepared(cfg)

# ---- a new data set, and other people's
def test_a_new_data_set_takes_ten_lines(tmp_path, monkeypatch):
    def chunks(path, chunk, size=None):
        for line in path.read_text().splitlines(): yield make_events(*([int(v)] for v in line.split(';')))
    monkeypatch.setitem(DATASETS, 'mine', Dataset('learn', 'check', (10,10), ('.ev',), label_of=lambda p: p.stem[0], reader=chunks))
    for s in ('learn','check'):
        (tmp_path/'raw'/s).mkdir(parents=True)
        for n in ('a1','b1'): (tmp_path/'raw'/s/f'{n}.ev').write_text('1;2;3;1\n4;5;6;0\n')
    store = EventStore(prepare(conf(tmp_path/'raw', tmp_path, 'mine')))
    assert store.classes==['a','b'] and store.events(0).tolist()==[(1,2,0,True),(4,5,3,False)]

def test_tonic_plugs_in(tmp_path):
    tonic = pytest.importorskip('tonic')
    class Digits(tonic.Dataset):
        sensor_size = (34,34,2)
        def __init__(self, n, transform=None): super().__init__(str(tmp_path)); self.n,self.transform = n,transform
        def __len__(self): return self.n
        def __getitem__(self, i):
            if i>=self.n: raise IndexError(i)
            e = events(seed=i).astype([('x','<i8'),('y','<i8'),('t','<i8'),('p','<i8')])   # tonic's NMNIST
            return (self.transform(e) if self.transform else e), i%3
    prepare_samples(tmp_path/'store', Digits(9), Digits(3, tonic.transforms.RandomFlipLR((34,34,2), p=1.)), (34,34), classes=['a','b','c'])
    train,val = EventStore(tmp_path/'store'),EventStore(tmp_path/'store', 'val')
    assert train.classes==['a','b','c'] and np.bincount(train.labels).tolist()==[3,3,3]
    i = int(np.flatnonzero(train.names=='a/0000000')[0]); raw = events(seed=0)
    assert np.array_equal(train.events(i)['x'], raw['x'])
    j = int(np.flatnonzero(val.names=='a/0000000')[0])
    assert np.array_equal(val.events(j)['x'], 33-raw['x'])
    assert int(histogram(batch_events([raw], (34,34))).sum())==len(raw)                # straight into a batch
    frame = tonic.transforms.ToFrame((34,34,2), event_count=len(raw))(raw)             # and ours through theirs
    assert np.array_equal(frame[0][::-1], histogram(batch_events([raw], (34,34)))[0].numpy())
    again = tonic.transforms.TimeAlignment()(raw)
    assert again.dtype==raw.dtype and again['t'][0]==0

def test_a_sample_is_loaded_once_and_what_chance_gave_it_is_stored(tmp_path):
    class Chancy:
        def __init__(self, n): self.loads = [0]*n
        def __len__(self): return len(self.loads)
        def __getitem__(self, i): self.loads[i] += 1; return events(seed=100*self.loads[i]+i), i%2
    train,val = Chancy(6),Chancy(2)
    m = prepare_samples(tmp_path/'new'/'store', train, val, (34,34))
    assert train.loads==[1]*6 and val.loads==[1]*2 and m['recordings']==8
    assert np.array_equal(EventStore(tmp_path/'new'/'store').events(0)['x'], events(seed=100)['x'])
    assert [p.name for p in (tmp_path/'new').iterdir()]==['store']                     # nothing else is left
    same = [(events(seed=i), 0) for i in range(3)]
    prepare_samples(tmp_path/'same', same, same[:1], (34,34))
    before = (tmp_path/'same'/'manifest.json').stat().st_mtime_ns
    prepare_samples(tmp_path/'same', same, same[:1], (34,34))
    assert (tmp_path/'same'/'manifest.json').stat().st_mtime_ns==before

def test_a_sample_that_is_none_is_named_and_an_empty_one_refused(tmp_path):
    bad = np.zeros(2, [('x','<i8'),('y','<i8'),('t','<i8'),('p','<i8')]); bad['x'] = 70_000
    with pytest.raises(ValueError, match='train sample 1: x = 70000'): prepare_samples(tmp_path/'a', [(events(), 0), (bad, 0)], [], (34,34))
    m = prepare_samples(tmp_path/'a', [(events(), 0), (bad[:0], 0)], [], (34,34))
    assert m['recordings']==1 and 'train sample 1: no events' in m['refused'][0]['reason']

def test_one_file_for_a_folder_is_told(tmp_path):
    fill(tmp_path, ['a.bin'])
    with pytest.raises(FileNotFoundError, match='no data folder .*a.bin., but a file; set data_path to the folder'): prepare(conf(tmp_path/'a.bin', tmp_path, 'recordings'))

# ---- where files lie
def test_linked_folders_are_followed_once(tmp_path):
    fill(tmp_path/'elsewhere', ['a.npy','deep/b.npy'])
    (tmp_path/'raw').mkdir(); (tmp_path/'raw'/'link').symlink_to(tmp_path/'elsewhere'); (tmp_path/'elsewhere'/'back').symlink_to(tmp_path/'raw')
    recs = list_recordings(tmp_path/'raw', DATASETS['recordings'], val_fraction=0)
    assert [r.name for r in recs]==['link/a.npy','link/deep/b.npy']

def test_names_may_hold_spaces_and_letters_of_any_script(tmp_path):
    fill(tmp_path/'raw', ['eine Übung/今日 1.bin','eine Übung/2.bin','b/1.bin','b/2.bin'])
    store = EventStore(prepare(conf(tmp_path/'raw', tmp_path, 'folder')))
    assert store.classes==['b','eine Übung'] and set(store.names)<={'eine Übung/今日 1','eine Übung/2','b/1','b/2'}

@pytest.mark.parametrize('line', ['window_overlap = 1', 'window_us = -5'])
def test_windows_that_never_end_are_refused(line):
    with pytest.raises(ValueError, match='window_overlap below 1'): parse_config(line)

def test_without_validation_the_split_is_empty_but_opens(tmp_path):
    fill(tmp_path/'raw', ['a.npy','b.npy'])
    folder = prepare(conf(tmp_path/'raw', tmp_path, 'recordings', 'val_fraction = 0'))
    assert len(EventStore(folder, 'val'))==0 and EventStore(folder, 'val').damaged()==[] and len(EventStore(folder))>0

def test_a_store_does_not_swallow_the_recordings_it_is_made_of(tmp_path):
    fill(tmp_path/'raw', ['a.npy','b.npy']); (tmp_path/'raw'/'manifest.json').write_text('{}')
    for place in (tmp_path/'raw', tmp_path):
        with pytest.raises(ValueError, match='lie within the store|holds something that is no packed store'): prepare(conf(tmp_path/'raw', tmp_path/'runs', 'recordings', f'store_path = {place}'))
    assert len(list((tmp_path/'raw').iterdir()))==3

def test_another_data_path_is_not_answered_from_the_old_store(tmp_path):
    fill(tmp_path/'raw', ['c/1.bin','c/2.bin'])
    prepare(conf(tmp_path/'raw', tmp_path, 'folder', f'store_path = {tmp_path}/st'))
    with pytest.raises(FileNotFoundError, match='no data folder'): prepare(conf(tmp_path/'typo', tmp_path, 'folder', f'store_path = {tmp_path}/st'))

def test_a_dead_link_is_refused_by_name_and_one_side_of_a_sensor_is_not_enough(tmp_path):
    fill(tmp_path/'raw', ['c/1.bin','c/2.bin','c/3.bin']); (tmp_path/'raw'/'c'/'4.bin').symlink_to(tmp_path/'nowhere')
    m = read_manifest(prepare(conf(tmp_path/'raw', tmp_path, 'folder')))
    assert m['recordings']==3 and '4.bin' in m['refused'][0]['reason'] and 'no such file' in m['refused'][0]['reason']
    with pytest.raises(ValueError, match='both sensor_H and sensor_W'): prepare(conf(tmp_path/'raw', tmp_path, 'folder', 'sensor_H = 34'))

def test_stores_of_another_version_are_prepared_again(tmp_path):
    fill(tmp_path/'raw', ['c/1.bin','c/2.bin'])
    cfg = conf(tmp_path/'raw', tmp_path, 'folder'); folder = prepare(cfg)
    m = json.loads((folder/'manifest.json').read_text()); m['version'] = 2; (folder/'manifest.json').write_text(json.dumps(m))
    assert read_manifest(prepare(cfg))['version']==3

def test_a_part_is_asked_for_by_its_number(digits, tmp_path):
    text = f'data_set = folder\ndata_path = {digits}\nruns_dir = {tmp_path}\nprepare_workers = 1\n'
    for word in ('3','0/3','4/3','a/b'):
        with pytest.raises(ValueError, match='should be part/parts, such as 3/100'): prepare(parse_config(text + f'prepare_part = {word}'))
    for k in (1,2): folder = prepare(parse_config(text + f'prepare_part = {k}/2'))
    assert not folder.exists()
    assert prepare(parse_config(text))==folder and read_manifest(folder)['recordings']==60 and not folder.with_name(folder.name+'.parts').exists()
    with pytest.raises(ValueError, match='digits are simulated by one process'): prepare(parse_config(f'data_path = {tmp_path}/d\nruns_dir = {tmp_path}\nprepare_part = 1/2\ndata_set = digits'))

def test_no_file_stays_away_in_silence(tmp_path, capsys):
    fill(tmp_path/'raw', ['a/1.bin','a/2.bin','a/deep/3.bin','b/1.bin','b/2.bin','loose.bin'])
    (tmp_path/'raw'/'a'/'4.evt').write_bytes(b'x'); (tmp_path/'raw'/'.hidden').write_bytes(b'x')
    cfg = conf(tmp_path/'raw', tmp_path, 'folder'); assert read_manifest(prepare(cfg))['recordings']==4
    told = capsys.readouterr().out
    assert f"not read of the files below {tmp_path/'raw'}: 3, such as a/4.evt, a/deep/3.bin, loose.bin; read are .bin" in told
    prepare(cfg); assert 'not read' not in capsys.readouterr().out                        # told once
    prepare(conf(tmp_path/'raw', tmp_path, 'recordings')); assert ': 1, such as a/4.evt;' in capsys.readouterr().out
    fill(tmp_path/'whole', ['a/1.bin','a/2.bin']); prepare(conf(tmp_path/'whole', tmp_path, 'folder')); assert 'not read' not in capsys.readouterr().out

def test_the_reason_of_an_empty_class_is_its_own_not_that_of_a_longer_name(tmp_path):
    fill(tmp_path/'raw', ['train/cat-old/1.bin','train/cat-old/2.bin','val/cat-old/1.bin','train/cat/1.bin'])
    (tmp_path/'raw'/'train'/'cat'/'1.bin').write_bytes(b'<html>'); (tmp_path/'raw'/'train'/'cat-old'/'2.bin').write_bytes(b'')   # '-' sorts before '/'
    with pytest.raises(ValueError, match="class 'cat' in train; the first reason: .*a web page"): prepare(conf(tmp_path/'raw', tmp_path, 'folder'))

def test_prepare_needs_no_configuration_file(tmp_path, capsys):
    fill(tmp_path/'raw', ['a.npy','b.npy'])
    words = [f'data_path={tmp_path}/raw', 'data_set=recordings', f'runs_dir={tmp_path}/runs', 'prepare_workers=1']
    command('prepare', words[0], words[1:])
    assert '2 recordings' in capsys.readouterr().out and len(list((tmp_path/'runs'/'stores').glob('recordings-*')))==1
    for step,conf in (('prepare',''), ('pretrain','')):
        with pytest.raises(ValueError, match='wants a configuration file'): command(step, conf)
    with pytest.raises(FileNotFoundError, match='no configuration file'): command('pretrain', words[0], words[1:])
