"Data: listing, splits, the packed store and batches; what cannot be read is told, never replaced."
import json, os, shutil
import numpy as np, pytest, torch
from mem_nb.config import parse_config
from mem_nb.data import all_frames, collate, eval_batches, make_frames, num_steps, train_batches
from mem_nb.datasets import DATASETS, find_dataset, list_recordings, prepare, store_path
from mem_nb.finetune import label_subset
from mem_nb.formats import read_events, write_bin
from mem_nb.store import EventStore, read_manifest, split_hash

@pytest.fixture
def cfg(digits, tmp_path):
    return parse_config(f'data_path = {digits}\ndata_set = nmnist\nruns_dir = {tmp_path}\ninput_H=32\ninput_W=32\nframe_fit=crop\nnum_layers=2\nnum_mask_patches=32')

def test_store_keeps_every_event_of_every_file(cfg, digits):
    folder = prepare(cfg)
    for split in ('train','val'):
        store = EventStore(folder, split)
        for i in range(len(store)):
            raw,got = read_events(digits/f'{store.names[i]}.bin'),store.events(i)
            assert all(np.array_equal(raw[k], got[k]) for k in 'xyp') and np.array_equal(raw['t']-raw['t'][0], got['t'])

def test_eight_bytes_an_event(cfg):
    folder = prepare(cfg)
    assert sum(f.stat().st_size for f in folder.glob('*.events'))==8*read_manifest(folder)['events']   # defect 8: it was 32

def test_prepare_twice_writes_once_and_notices_a_new_file(cfg, digits, tmp_path):
    copy = tmp_path/'copy'; shutil.copytree(digits, copy); cfg.data.data_path = str(copy)
    folder = prepare(cfg); stamp = (folder/'manifest.json').stat().st_mtime_ns
    prepare(cfg); assert (folder/'manifest.json').stat().st_mtime_ns==stamp
    shutil.copy(next(copy.glob('0/*.bin')), copy/'0'/'99999.bin')
    prepare(cfg); assert read_manifest(folder)['recordings']==61

def test_defect_1_classes_match_exactly_and_split_lists_are_checked(digits, tmp_path):
    root = tmp_path/'animals'
    for i,c in enumerate(['ant','elephant']): shutil.copytree(digits/str(i), root/c)
    names = [f'{c}/{p.stem}' for c in ('ant','elephant') for p in sorted((root/c).iterdir())]
    (tmp_path/'split.txt').write_text('\n'.join(f'{"val" if i%2 else "train"}/{n}.npy' for i,n in enumerate(names)))
    recs = list_recordings(root, DATASETS['folder'], tmp_path/'split.txt')
    assert len(recs)==len(names) and all(r.label==r.path.parent.name for r in recs)
    (tmp_path/'split.txt').write_text('train/ant/none.bin\nval/ant/nobody.bin\n')
    with pytest.raises(ValueError, match='lists 2 recordings that are not there'): list_recordings(root, DATASETS['folder'], tmp_path/'split.txt')
    (tmp_path/'split.txt').write_text('test/ant/none.bin\n')
    with pytest.raises(ValueError, match='line 1'): list_recordings(root, DATASETS['folder'], tmp_path/'split.txt')

def test_defect_7_a_file_that_fails_is_refused_by_name_and_the_rest_go_in(cfg, digits, tmp_path, capsys):
    copy = tmp_path/'copy'; shutil.copytree(digits, copy); cfg.data.data_path = str(copy)
    victim = next(copy.glob('4/*.bin')); victim.write_bytes(victim.read_bytes()[:-1])
    manifest = read_manifest(prepare(cfg))
    assert manifest['recordings']==59 and f'4/{victim.stem}' in manifest['refused'][0]['name'] and f'refused' in capsys.readouterr().out

@pytest.mark.parametrize('harm,said', [
    (lambda root: shutil.rmtree(root), 'no data folder'),
    (lambda root: [shutil.rmtree(p) for p in root.iterdir() if p.is_dir()], 'holds no class folders'),
    (lambda root: [p.unlink() for p in (root/'3').iterdir()], 'class folder .*3 holds no .bin file'),
    (lambda root: [p.write_bytes(b'') for p in (root/'3').iterdir()], "no readable recording is left of class '3' in train"),
    (lambda root: [write_bin(p, np.array([(40,1,5,True)], dtype=[('x','<i2'),('y','<i2'),('t','<i8'),('p','?')])) for p in (root/'3').iterdir()], "no readable recording is left of class '3' in train")])
def test_bad_folders_are_named_and_leave_nothing_behind(cfg, digits, tmp_path, harm, said):
    copy = tmp_path/'copy'; shutil.copytree(digits, copy); harm(copy); cfg.data.data_path = str(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=said): prepare(cfg)
    assert not (tmp_path/'stores').exists() or not list((tmp_path/'stores').iterdir())

def test_a_store_that_was_cut_or_never_finished_is_no_store(cfg):
    folder = prepare(cfg)
    with open(folder/'train.events', 'r+b') as f: f.truncate(16)
    with pytest.raises(ValueError, match='holds 16 bytes, its index asks for'): EventStore(folder)
    (folder/'manifest.json').unlink()
    with pytest.raises(FileNotFoundError, match='run `mem_nb prepare`'): EventStore(folder)

def test_unlabelled_recordings_are_cut_into_windows(digits, tmp_path):
    cfg = parse_config(f'data_path = {digits}\ndata_set = recordings\nruns_dir = {tmp_path}\nslice_max_evs = 500\nsensor_H = 34\nsensor_W = 34')
    folder = prepare(cfg)
    store = EventStore(folder)
    assert store.classes==[] and (store.labels==-1).all() and (store.stops-store.starts).max()<=500 and len(store)>100
    assert store.offsets[-1]+EventStore(folder,'val').offsets[-1]==sum(len(read_events(p)) for p in digits.glob('*/*.bin'))
    with pytest.raises(ValueError, match='have no labels'): label_subset(store.labels, 10, 0)

def test_batch_k_is_a_function_of_seed_and_k(cfg):
    store = EventStore(prepare(cfg))
    get = train_batches(store, None, 16, seed=0, max_events=700)
    one,two = list(get(0,9)),list(get(5,9))
    assert all(torch.equal(a.words,b.words) and torch.equal(a.labels,b.labels) for a,b in zip(one[5:], two))
    other = next(iter(train_batches(store, None, 16, seed=1, max_events=700)(0,1)))
    assert not torch.equal(one[0].labels, other.labels)
    with_workers = list(train_batches(store, None, 16, 0, 700, num_workers=1)(5,9))
    assert all(torch.equal(a.words,b.words) for a,b in zip(two, with_workers))

def test_an_epoch_sees_each_recording_once(cfg):
    store = EventStore(prepare(cfg)); n = len(store)
    seen = torch.cat([b.labels for b in train_batches(store, None, n//5, 0, 700)(0,5)])
    assert sorted(seen.tolist())==sorted(store.labels.tolist())

def test_defect_6_validation_is_deterministic(cfg):
    store = EventStore(prepare(cfg), 'val')
    assert torch.equal(all_frames(store, cfg.data), all_frames(store, cfg.data))
    assert sum(len(b) for b in eval_batches(store, batch_size=5))==len(store)

def test_frames_of_a_batch_are_the_frames_of_its_samples(cfg):
    store = EventStore(prepare(cfg))
    together = make_frames(collate(store, [0,3,5]), cfg.data)
    alone = torch.cat([make_frames(collate(store, [i]), cfg.data) for i in (0,3,5)])
    assert torch.allclose(together, alone)

@pytest.mark.parametrize('seed', range(5))
def test_label_subsets_cover_classes_nest_and_are_stratified(seed):
    labels = np.repeat(np.arange(10), [40,10,80,20,30,60,50,70,90,150])
    sets = [label_subset(labels, n, seed) for n in (10, 60, .5, 'all')]
    assert [len(s) for s in sets]==[10,60,300,600]
    assert all(set(a)<=set(b) for a,b in zip(sets, sets[1:])) and len(np.unique(labels[sets[0]]))==10
    assert np.abs(np.bincount(labels[sets[2]])-np.bincount(labels)/2).max()<=2

def test_split_hash_ignores_order_and_notices_a_name():
    assert split_hash(['a','b'])==split_hash(['b','a'])!=split_hash(['a','c'])

def test_full_disk_is_told_and_the_same_command_continues(cfg, monkeypatch):
    import errno, mem_nb.pack as pack
    def full(*a): raise OSError(errno.ENOSPC, 'No space left on device')
    cfg.run.prepare_workers = 1
    with monkeypatch.context() as m:
        m.setattr(pack, 'pack_chunk', full)
        with pytest.raises(OSError, match='disk is full.*run the same command again.*store_path'): prepare(cfg)
    assert not store_path(cfg).exists()                      # nothing that a later run would take for good
    assert len(EventStore(prepare(cfg))) and not store_path(cfg).with_name(f'{store_path(cfg).name}.preparing').exists()

def test_unknown_data_set_lists_the_known_ones():
    with pytest.raises(KeyError, match='known: folder, npy'): find_dataset('mnist')

def test_steps_of_a_run(): assert (num_steps(600, 10, 64), num_steps(5, 1, 64))==(94, 1)

def write_npy(path, x=(1,2), t=(1,5)):
    from mem_nb.events import make_events
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, make_events(np.array(x), np.array([1,2]), np.array(t), np.array([1,0])))

def test_a_folder_that_is_no_store_is_never_deleted(cfg, tmp_path):
    precious = tmp_path/'precious'; precious.mkdir(); (precious/'thesis.txt').write_text('hi')
    cfg.data.store_path = str(precious)
    with pytest.raises(ValueError, match='holds something that is no packed store'): prepare(cfg)
    assert (precious/'thesis.txt').read_text()=='hi'

def test_other_events_under_the_same_names_have_another_hash(cfg, digits, tmp_path):
    a = EventStore(prepare(cfg))
    copy = tmp_path/'copy'; shutil.copytree(digits, copy)
    for p in copy.glob('*/*.bin'): p.write_bytes(p.read_bytes()[:1000])
    cfg.data.data_path = str(copy)
    b = EventStore(prepare(cfg))
    assert a.split_hash==b.split_hash and a.data_hash!=b.data_hash

def test_a_store_follows_its_settings(digits, tmp_path):
    cfg = parse_config(f'data_path = {digits}\ndata_set = recordings\nstore_path = {tmp_path}/st\nslice_max_evs = 300\nsensor_H = 34\nsensor_W = 34')
    assert max((st := EventStore(prepare(cfg))).stops-st.starts)==300
    cfg.data.slice_max_evs = 600
    assert max((st := EventStore(prepare(cfg))).stops-st.starts)==600

def test_no_recording_is_in_train_and_val_at_once(digits, tmp_path):
    root = tmp_path/'two'; write_npy(root/'c'/'a.npy'); write_bin(root/'c'/'a.bin', read_events(next(digits.glob('0/*.bin'))))
    with pytest.raises(ValueError, match='holds a in two formats'): list_recordings(root, DATASETS['folder'])
    name = next(digits.glob('0/*.bin')).stem
    (tmp_path/'s.txt').write_text(f'train/0/{name}.bin\n\nval/0/{name}.npy\n')
    with pytest.raises(ValueError, match='line 3: 0/.* stands in line 1 already'): list_recordings(digits, DATASETS['folder'], tmp_path/'s.txt')

def test_coordinates_that_do_not_fit_name_their_file(tmp_path):
    for i in range(4): write_npy(tmp_path/'data'/'c'/f'{i}.npy', x=(1,5000) if i==0 else (1,2))
    cfg = parse_config(f'data_path = {tmp_path}/data\nruns_dir = {tmp_path}\nval_fraction = 0.5')
    refused = read_manifest(prepare(cfg))['refused']
    assert len(refused)==1 and '0.npy' in refused[0]['reason'] and '5000' in refused[0]['reason']

def test_small_classes_still_get_a_validation_part(tmp_path):
    for c in 'ab':
        for i in range(2): write_npy(tmp_path/c/f'{i}.npy')
    recs = list_recordings(tmp_path, DATASETS['folder'])
    assert {(r.label, r.split) for r in recs}=={(c,s) for c in 'ab' for s in ('train','val')}

def test_a_class_that_is_only_in_val_is_refused(tmp_path):
    for split,c in [('train','cat'), ('val','cat'), ('val','Cat')]: write_npy(tmp_path/'d'/split/c/'0.npy')
    with pytest.raises(ValueError, match="'Cat' is in val but not in train"): prepare(parse_config(f'data_path = {tmp_path}/d\nruns_dir = {tmp_path}'))

