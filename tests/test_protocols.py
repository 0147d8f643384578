"Draws of labels, checks before training, measures, recipes of finetuning, and runs laid side by side: laws, on tiny runs."
import json
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from conftest import TINY
from mem_nb import finetune as ft
from mem_nb.compare import all_records, compare, open_run, page_pictures, run_gains
from mem_nb.config import check_config, parse_config, save_config
from mem_nb.datasets import prepare
from mem_nb.encoder import load_encoder
from mem_nb.metrics import accuracy_metrics, calibration_error, interval, reliability
from mem_nb.mistakes import worst
from mem_nb.pipeline import command
from mem_nb.pretrain import pretrain
from mem_nb.probes import describe, judge, frame_models, knn_signal
from mem_nb.protocols import PROTOCOLS, few_labels, linear_probe, pretrained_encoder, simple_records
from mem_nb.splits import check_labels, check_overlap, coverage, draw_labels, label_subset, listed_subset, save_list
from mem_nb.state import check_settings, load_weights, read_log, step_settings
from mem_nb.store import EventStore, split_hash

FAST = ['num_digits=80', 'mae=1', 'pt_epochs=2', 'pt_batch_size=32', 'pt_knn_epochs=1', 'class_epochs=2', 'class_update_freq=1', 'class_labels=2/class', 'class_seeds=0 1']
def make(root, *overrides): return parse_config(TINY, [f'runs_dir={root}/runs', f'data_path={root}/digits', *FAST, *overrides])
def stores(cfg): return [EventStore(prepare(cfg), split) for split in ('train','val')]

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A tiny pretrained encoder and its data."
    cfg = make(tmp_path_factory.mktemp('protocols'))
    pretrain(cfg)
    save_config(cfg, cfg.folder/'run.conf')
    return cfg, *stores(cfg)

# ---- draws
counts = st.lists(st.integers(1, 30), min_size=1, max_size=12)
@given(counts, st.integers(0, 99), st.data())
@settings(max_examples=60, deadline=None)
def test_a_draw_covers_what_it_can_and_grows_by_adding(sizes, seed, data):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    n = data.draw(st.integers(1, len(labels)))
    own = label_subset(labels, n, seed)
    assert len(own)==len(set(own.tolist()))==n and len(np.unique(labels[own]))==min(n, len(sizes))
    if n<len(labels): assert set(own) < set(label_subset(labels, n+1, seed))
    k = min(sizes)
    assert np.bincount(labels[label_subset(labels, f'{k}/class', seed)]).tolist()==[k]*len(sizes)

def test_a_list_gives_its_draw_back_and_names_what_is_absent(run, tmp_path):
    _,train,_ = run
    own = draw_labels(train, 30, 1)
    assert save_list(tmp_path/'own.txt', train.names[own])==split_hash(train.names[own])
    assert np.array_equal(draw_labels(train, str(tmp_path/'own.txt'), 9), own)
    (tmp_path/'bad.txt').write_text('train/0/none.npy\n')
    with pytest.raises(ValueError, match='0/none'): draw_labels(train, str(tmp_path/'bad.txt'), 0)

def test_the_published_2_percent_list_covers_46_of_101_classes(shared):
    folder = shared/'original_configs'/'splits'
    train = [l.removeprefix('train/').rsplit('.',1)[0] for l in (folder/'ncaltech101.txt').read_text().split() if l.startswith('train/')]
    classes = sorted({n.split('/')[0] for n in train})
    labels = np.array([classes.index(n.split('/')[0]) for n in train])
    own = listed_subset(train, folder/'ncaltech101-2percent.txt')
    assert len(own)==84 and coverage(labels, classes, own)['covered']==46
    assert coverage(labels, classes, label_subset(labels, 101, 0))['covered']==101==len(classes)

# ---- bad input
def test_what_cannot_be_trained_is_told_before_training(run, capsys):
    cfg,train,val = run
    with pytest.raises(ValueError, match='99 recordings of each class, class .0. has'): ft.finetune(replace(cfg, finetune=replace(cfg.finetune, labels=('99/class',))))
    assert not (cfg.folder/'finetune').exists()
    assert check_labels(train, val, (4,)) and 'never learned' in capsys.readouterr().out
    wrong = EventStore(train.folder); wrong.labels = np.full(len(wrong), 10)
    with pytest.raises(ValueError, match='list of classes ends at 9'): check_labels(wrong, val)
    few = EventStore(train.folder); few.labels = np.where(few.labels==3, 4, few.labels)
    with pytest.raises(ValueError, match="class '3' has no training"): check_labels(few, val)
    lacks = EventStore(val.folder, 'val'); lacks.labels = np.where(lacks.labels==3, 4, lacks.labels)
    assert 'none of 3' in check_labels(train, lacks)[0]

def test_overlap_is_found_by_the_bytes_under_another_name(run, tmp_path):
    "The store of another run trained on a copy of a validation recording."
    import shutil
    cfg,train,val = run
    root = next(Path(cfg.data.data_path).glob('80_seed*'))
    copy = tmp_path/'raw'
    shutil.copytree(root, copy)
    victim = sorted(p for p in copy.rglob('*.bin') if f'{p.parent.name}/{p.stem}' in val.names)[0]
    shutil.copy(victim, victim.with_name('99999.bin'))
    lines = [f'train/{n}.bin' for n in (*train.names, f'{victim.parent.name}/99999')] + [f'val/{n}.bin' for n in val.names]
    (tmp_path/'split.txt').write_text('\n'.join(lines))
    other = parse_config(TINY, [f'runs_dir={tmp_path}/runs', f'data_path={copy}', 'data_set=folder', f'split_file={tmp_path}/split.txt', 'class_methods=scratch'])
    with pytest.raises(ValueError, match='1 validation recordings were seen in training, such as .*99999'): ft.finetune(other)
    check_overlap(prepare(other), val.folder, 'training', allow=True)

@pytest.mark.parametrize('key', ['class_labels=0/class', 'class_labels=nothing', 'class_keep=best', 'class_mixup=-1', 'class_input_H=30', 'class_slices=0'])
def test_settings_that_cannot_be(key):
    with pytest.raises(ValueError, match=key.split('=')[0]): parse_config(TINY, [key])

def test_budgets_of_as_many_labels_keep_columns_of_their_own():
    from fastcore.xml import to_xml
    from mem_nb.compare import results_table
    rec = lambda labels, n, a: dict(method='svm', labels=labels, n_labels=n, accuracy=a)
    page = to_xml(results_table([rec('50', 50, .5), rec('5/class', 50, .7), rec('all', 100, .9)]))
    for word in ('50 labels (50)', '50 labels (5/class)', '50.0', '70.0', '100 labels<'): assert word in page

# ---- measures
@given(st.integers(2, 8), st.integers(1, 60), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_measures_keep_within_their_bounds(k, n, seed):
    g = torch.Generator().manual_seed(seed)
    p,y = torch.rand(n, k, generator=g).softmax(1),torch.randint(k, (n,), generator=g)
    m = {key:float(v) for key,v in accuracy_metrics(p, y).items()}
    assert 0<=m['accuracy']<=m['top5']<=1 and 0<=m['calibration_error']<=1 and (k>5 or m['top5']==1)
    assert reliability(p, y)[:,0].sum()==n and calibration_error(torch.eye(k)[y], y)==0

def test_an_interval_narrows_with_draws_and_holds_the_mean():
    low,high = interval([.1,.2,.3])
    assert low<.2<high and interval([.1,.2,.3]*4)[1]<high and interval([.5]) is None

def test_judge_agrees_with_scikit_learn_and_orders_by_score():
    rng = np.random.default_rng(0)
    x,y = rng.normal(size=(80,6)),np.arange(80)%8
    x[:,:3] += y[:,None]*[.4,-.2,.1]
    for name,model in frame_models().items():
        found = judge(model, x[:40], y[:40], x[40:], y[40:])
        assert np.isclose(found['accuracy'], model.fit(x[:40], y[:40]).score(x[40:], y[40:])), name
        assert found['top5']>=found['accuracy']

def test_worst_are_wrong_or_nearly():
    p = torch.tensor([[.9,.1],[.2,.8],[.6,.4],[.55,.45]])
    assert worst(p, np.array([1,1,1,0]), 1)==dict(confident=[0], hardest=[0])

# ---- finetuning
def test_mixing_keeps_mass_and_draws_anew_each_step_but_the_same_for_a_seed():
    x,y = torch.rand(6,3,8,8),torch.arange(6)%3
    def mix(seed, **k): torch.manual_seed(seed); return ft.mix_frames(x, y, 3, **k)
    for k in (dict(mixup=.8), dict(cutmix=1.), dict(mixup=.8, cutmix=1.)):
        (f,t),(f2,t2),(f3,_) = mix(1, **k),mix(1, **k),mix(2, **k)
        assert torch.equal(f, f2) and torch.equal(t, t2) and not torch.equal(f, f3) and torch.allclose(t.sum(1), torch.ones(6))
    f,_ = mix(3, cutmix=1.)
    assert all(any(torch.equal(f[i,:,a,b], o[:,a,b]) for o in (x[i], x[i-1])) for i in range(6) for a in range(8) for b in range(8))

def test_balanced_weights_make_classes_count_alike():
    y = np.array([0]*9+[1]*3+[3])
    w = ft.class_weights(y, 5).numpy()
    assert np.allclose(np.bincount(y, w[y], minlength=5)[[0,1,3]], len(y)/3) and w[2]==w[4]==0

def test_the_kept_weights_are_the_best_of_all_looks_and_those_reported(run):
    cfg,train,val = run
    own = replace(cfg, run=replace(cfg.run, expname='keep'), finetune=replace(cfg.finetune, keep='held_out', labels=(50,), methods=('scratch',), min_steps=24, checkpoint=''))
    r = ft.finetune_one(own, train, val, 'scratch', 50, 0)
    folder = own.folder/'finetune'/ft.run_name('scratch', 50, 0)
    log = [l for l in read_log(folder) if 'val_held_out_accuracy' in l]
    assert len(log)>3 and r['held_out_accuracy']==max(l['val_held_out_accuracy'] for l in log) and r['chosen_on']=='held_out' and r['n_labels']==50
    said = ft.predict(ft.load_classifier(own, 10, 'scratch', 50, 0), val, own.data)
    assert np.isclose(float((said.argmax(1)==torch.from_numpy(val.labels)).float().mean()), r['accuracy'])
    assert ft.finetune_one(own, train, val, 'scratch', 50, 0)==r                                 # done is done

def test_held_out_recordings_are_not_trained_on(run):
    _,train,_ = run
    own = draw_labels(train, 50, 0)
    out = ft.held_out(train.labels[own], 0)
    assert 0<out.sum()<25 and len(np.unique(train.labels[own][~out]))==10

def test_a_larger_frame_takes_the_pretrained_weights_with_it(run):
    cfg,train,val = run
    wide = check_config(replace(cfg, run=replace(cfg.run, expname='wide'), finetune=replace(cfg.finetune, input_H=40, input_W=48, checkpoint=str(cfg.folder/'pretrain'/'final.safetensors'),
                                                                                       mixup=.8, cutmix=1., balanced=True, slices=2)))
    r = ft.finetune_one(wide, train, val, 'pretrained', '2/class', 0)
    model = ft.load_classifier(wide, 10, 'pretrained', '2/class', 0)
    assert model.patch_embed.grid_size==(10,12) and r['n_labels']==20 and (wide.folder/'finetune'/'pretrained_2_a_class_seed0'/'labels.txt').is_file()

def test_slices_average_what_each_says(run):
    cfg,_,val = run
    model,data = ft.build_classifier(cfg, 10, head_scale=1.).eval(),replace(cfg.data, slice_max_evs=300)
    at = [torch.cat([model(ft.make_frames(b, data)).softmax(1) for b in ft.eval_batches(val, max_events=300, start=u)]) for u in (0.,.5,1.)]
    with torch.no_grad(): assert torch.allclose(ft.predict(model, val, data, slices=3), sum(at)/3, atol=1e-6) and not torch.equal(at[0], at[2])
    assert torch.allclose(ft.predict(model, val, data), at[1], atol=1e-6)

def test_supervised_rgb_weights_start_a_finetuning(run, tmp_path):
    from timm.models.vision_transformer import VisionTransformer
    from mem_nb.state import save_weights
    save_weights(VisionTransformer(img_size=32, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=3), tmp_path/'rgb.safetensors')
    cfg = make(Path(run[0].run.runs_dir).parent, 'expname=rgb', 'pt_skip=1', 'pretrained=1', f'pt_checkpoint={tmp_path}/rgb.safetensors', 'class_methods=pretrained', 'class_seeds=0')
    r, = ft.finetune(cfg)
    assert r['method']=='pretrained' and r['n_labels']==20

# ---- protocols, pretraining's signal, comparison
def test_every_epoch_of_pretraining_tells_of_its_neighbours(run):
    cfg,train,_ = run
    told = [l['val_knn_accuracy'] for l in read_log(cfg.folder/'pretrain') if 'val_knn_accuracy' in l]
    assert len(told)>=2 and all(0<=a<=1 for a in told)
    encoder = load_encoder(ft.config_encoder(cfg), cfg.folder/'pretrain'/'final.safetensors')
    assert np.isclose(knn_signal(encoder, train, cfg.data)['knn_accuracy'], told[-1]) and encoder.training

def test_each_protocol_is_a_command_and_prints_the_fingerprint(run, capsys):
    cfg,train,_ = run
    for name in PROTOCOLS:
        records = command(name, str(cfg.folder/'run.conf'))
        assert train.split_hash in capsys.readouterr().out and json.loads((cfg.folder/'probes'/f'{name}.json').read_text())==records
    assert {r['method'] for r in records}=={'majority','knn','svm','logistic'}
    seen = {}
    for r in few_labels(cfg): seen.setdefault(r['seed'], set()).add(r['subset_hash'])
    assert [len(v) for v in seen.values()]==[1,1]

def test_features_of_cells_are_asked_without_training_anew(run):
    "Probes see nine vectors a frame whose mean is the one of before (but for the norm after it); what is finetuned stays finished."
    cfg,train,val = run
    cells = replace(cfg, finetune=replace(cfg.finetune, probe_cells=3))
    encoder = pretrained_encoder(cfg)
    wide = describe(val, cfg.data, encoder, pixels=False, cells=3)[1]
    assert wide.shape==(len(val), 9*describe(val, cfg.data, encoder, pixels=False)[1].shape[1]) and not np.allclose(wide[:,:32], wide[:,-32:])
    records = simple_records(cells, train, val, encoder, only=('linear probe',))
    assert {r['seed'] for r in records}=={0,1}
    check_settings(step_settings(cfg, 'finetune'), step_settings(cells, 'finetune'), 'here')

def test_runs_are_compared_draw_by_draw_or_not_at_all(run, tmp_path, capsys):
    cfg,_,_ = run
    ft.finetune(cfg)
    other = make(Path(cfg.run.runs_dir).parent, 'expname=other', 'pt_lr=5e-4')
    pretrain(other); ft.finetune(other); save_config(other, other.folder/'run.conf')
    command('evaluate', str(cfg.folder), [str(other.folder), f'to={tmp_path}/page.html'])
    assert run[1].split_hash in capsys.readouterr().out
    page = (tmp_path/'page.html').read_text()
    a,b = open_run(cfg.folder),open_run(other.folder)
    assert page.count('<img ')==1+2*len(set(page_pictures(a.page)) | set(page_pictures(b.page))) and 'pt_lr' in page and '<script' not in page
    assert sum(r['method']=='SVM on frames' for r in all_records([a,b]))==2
    g, = run_gains([a,b])[b.name]
    assert g['seeds']==2 and g['interval'][0]<=g['mean']<=g['interval'][1]
    b.summary['results'] = [r for r in b.summary['results'] if r['method']!='pretrained']     # an arm of its own, from scratch
    assert run_gains([a,b])[b.name][0]['seeds']==2 and run_gains([b,a])[a.name][0]['seeds']==2
    b.summary['splits']['split_hash'] = 'another'
    assert 'not to be subtracted' in run_gains([a,b])[b.name]
    with pytest.raises(FileNotFoundError, match='no run'): command('evaluate', 'nowhere_at_all', ['too'])
