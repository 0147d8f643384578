"""Does pretraining help, how much? The study on 800 real N-MNIST recordings: 600 to learn from, 200 to report on.

python benchmarks/evidence.py --data <folder with Train/<digit>/<id>.bin> --json benchmarks/evidence.json

Stop it at any moment; the same command goes on, and the records hold what is finished. `--seeds 0 1`, `--labels 50 100` and `--arms` do a part.
`--jobs 2` does two trainings at once, each with its share of the cores: a small encoder leaves a second core idle.
With `--others <folder>` one arm is pretrained on recordings of other cameras (any formats, no labels), and never sees a digit before its labels.
Nothing is tuned here: the recipes stand in configs/nmnist.conf and in ARMS, and were found on the training part (nbs/tutorials/recipes.ipynb).
"""
import argparse, hashlib, json, shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple
import matplotlib.pyplot as plt, numpy as np
from scipy import stats
from common import asked, clock, machine, record, side_by_side, starts, table, wall_time, write
from mem_nb.config import load_config
from mem_nb.data import all_frames
from mem_nb.datasets import SUFFIXES, prepared
from mem_nb.evaluate import frame_baselines, pretrained_encoder, simple_records
from mem_nb.events import make_events
from mem_nb.finetune import finetune_one, label_subset, pretrained_path, run_name
from mem_nb.formats import read_events, write_events
from mem_nb.pretrain import pretrain
from mem_nb.state import weights_hash
from mem_nb.store import EventStore, split_hash
from mem_nb.tokenizer import tokenizer
from mem_nb.train import is_done
from mem_nb.viz import show_label_curve, style

CONF = Path(__file__).parents[1]/'configs/nmnist.conf'
ARMS = {                                    # what pretraining asks; same frames, encoder and number of steps
    'two views':                 ['pt_hidden=0', 'pt_contrast=1'],                        # which hide half each, and must be matched
    'hidden pixels (MAE)':       ['pt_hidden=1', 'pt_contrast=0'],
    'hidden tokens (MEM)':       ['pt_hidden=1', 'pt_contrast=0', 'mae=0']}
FIRST,OTHERS = next(iter(ARMS)),'two views, other cameras'
ARMS[OTHERS] = ARMS[FIRST]                  # pretrained on what other cameras saw, finetuned on N-MNIST
SCRATCH = ['class_min_steps=1200', 'class_epochs=128', 'class_warmup_epochs=8']   # twice the steps of the others; the configuration has its learning rate and layer decay
PLAIN = ['representation=histogram', 'frame_fit=crop', 'input_H=32', 'input_W=32']   # frames that throw time away, as before
SEEDS = [0,1,2,3,4]
WINDOW = 4000                                # events of a window of another camera, about as many as a recording of N-MNIST has
GOALS = {50:85, 100:92, 600:98}
SLUG = {arm:f'arm{i}' for i,arm in enumerate(ARMS)} | {'from scratch':'scratch'}

def config_of(arm, args):
    "The configuration of one kind of pretraining; all share one store, and the tokenizer where it is asked for."
    start = ['pt_skip=1', f'class_checkpoint={args.runs}/evidence/others/pretrain/final.safetensors'] if arm==OTHERS else []
    return load_config(CONF, [f'data_path={args.data}', f'runs_dir={args.runs}', 'expweek=evidence', f'expname={SLUG[arm]}', *ARMS.get(arm, SCRATCH), *start, *args.set])

def source_of(arm, args):
    "The configuration that the encoder of an arm is pretrained under: its own, but for other cameras."
    if arm!=OTHERS: return config_of(arm, args)
    words = [f'data_path={other_cameras(args)}', 'data_set=recordings', 'split_file=', 'sensor_H=34', 'sensor_W=34', f'slice_max_evs={WINDOW}', 'window_overlap=0.5', 'val_fraction=0.05',
             f'runs_dir={args.runs}', 'expweek=evidence', 'expname=others', 'class_methods=', *ARMS[arm], *args.set]
    cfg,own = load_config(CONF, words),config_of(FIRST, args)
    epochs = round(own.pretrain.epochs*len(stores(own)[0])/len(stores(cfg)[0]))      # as many steps as the other arms
    return load_config(CONF, [*words, f'pt_epochs={epochs}'])

def other_cameras(args):
    "Folder of `args.others` cut into squares of 128 pixels, each scaled to N-MNIST's 34: a store holds one sensor, and a digit is as large as a hand."
    files = sorted(p for p in Path(args.others).rglob('*') if p.suffix in SUFFIXES)
    digits = {hashlib.sha256(p.read_bytes()).digest() for p in Path(args.data).rglob('*.bin')}
    if known := [str(p) for p in files if hashlib.sha256(p.read_bytes()).digest() in digits]: raise ValueError(f"{known[0]} is one of the digits in {args.data}, too; --others takes other recordings")
    out = Path(args.runs)/'evidence'/f"others-{hashlib.sha256(repr([(p.name,p.stat().st_size) for p in files]).encode()).hexdigest()[:8]}"
    if out.is_dir(): return out
    half = out.with_suffix('.part')
    shutil.rmtree(half, ignore_errors=True); half.mkdir(parents=True)
    for p in files:
        e = read_events(p)
        tiles = (e['y'].astype(int)//128)*1000 + e['x']//128
        for tile in np.unique(tiles):
            own = e[tiles==tile]
            if len(own)>=WINDOW: write_events(half/f'{p.stem}_{tile:06d}.bin', make_events(own['x']%128*34//128, own['y']%128*34//128, own['t']-own['t'][0], own['p']), (34,34))
    return half.rename(out)

def stores(cfg): return EventStore(folder := prepared(cfg)),EventStore(folder, 'val')

def frames_records(name, cfg, args):
    "SVM, nearest neighbour, logistic regression and the commonest class on pixels; read where they were made before."
    train,val = stores(cfg)
    kept = Path(cfg.run.runs_dir)/f'evidence/{name}-{train.data_hash[:12]}.json'
    if not kept.is_file(): write(kept, list(_frames_records(name, cfg, train, val)))
    return [f for f in json.loads(kept.read_text()) if f['seed'] in args.seeds]

def _frames_records(name, cfg, train, val):
    x,val_x = (all_frames(s, cfg.data).flatten(1).numpy() for s in (train, val))
    for n in cfg.finetune.labels:
        for s in SEEDS if n!='all' else SEEDS[:1]:      # all of them are always the same
            own = label_subset(train.labels, n, s)
            y = train.labels[own]
            found = frame_baselines(x[own], y, val_x, val.labels, s)
            yield from (fact(f'{m} on {name}', len(own), k, a, train, own) for m,a in found.items() for k in (SEEDS if n=='all' else [s]))

def fact(method, n, seed, accuracy, train, own, **more):
    "One accuracy with all that identifies it."
    return dict(method=method, labels=n, n_labels=n, seed=seed, accuracy=float(accuracy), split_hash=train.split_hash,
                subset_hash=split_hash(train.names[own]), **more)

def finished(cfg, method, n, seed): return is_done(cfg.folder/'finetune'/run_name(method, n, seed))

def method_of(arm): return 'pretrained' if arm in ARMS else 'scratch'

def trained(arm, args):
    "The finetunings of one arm that are finished."
    cfg = config_of(arm, args)
    train,val = stores(cfg)
    for s in args.seeds:
        for n in cfg.finetune.labels:
            if not finished(cfg, method_of(arm), n, s): continue
            r = finetune_one(cfg, train, val, method_of(arm), n, s)
            yield fact(arm, r['n_labels'], s, r['accuracy'], train, label_subset(train.labels, n, s), seconds=r['seconds'], steps=r['steps'])

def frozen(arm, args):
    "Nearest neighbour and linear probe on the features of the pretrained encoder, which nothing has finetuned; read where they were made before."
    cfg = config_of(arm, args)
    kept = cfg.folder/f'frozen-{weights_hash(pretrained_path(cfg))}.json'
    if not kept.is_file():
        cfg.finetune.seeds,wanted = tuple(SEEDS),('knn on features','linear probe')
        write(kept, [{k:r[k] for k in ('labels','n_labels','seed','accuracy','split_hash','subset_hash')} | dict(method=f"{r['method'].removesuffix(' on features')}, {arm}")
                     for r in simple_records(cfg, *stores(cfg), pretrained_encoder(cfg), only=wanted)])
    return [f for f in json.loads(kept.read_text()) if f['seed'] in args.seeds]

def folder_of(arm, args):
    "Where the encoder of an arm is pretrained; of other cameras, nothing is cut for the asking."
    return Path(args.runs)/'evidence'/('others' if arm==OTHERS else SLUG[arm])

def pretrained(arm, args): return (arm!=OTHERS or bool(args.others)) and is_done(folder_of(arm, args)/'pretrain')

def counts_config(args): return load_config(CONF, [f'data_path={args.data}', f'runs_dir={args.runs}', *PLAIN])

def simple_facts(args):
    "What the simple methods reach on the frames of the study, and on frames without time."
    return frames_records('frames', config_of(FIRST, args), args) + frames_records('counts', counts_config(args), args)

def collect(args):
    "Everything that is finished, read from disk."
    found = simple_facts(args)
    for arm in ARMS:
        if pretrained(arm, args): found += [*frozen(arm, args), *trained(arm, args)]
    return found + list(trained('from scratch', args))

def difference(found, a, b, n):
    "Mean of `a - b` over the draws both have seen, with its 95 % interval (Student's t); None without two draws."
    seen = lambda m: {f['seed']:f for f in found if f['method']==m and f['n_labels']==n}
    first,second = seen(a),seen(b)
    both = sorted(first.keys() & second.keys())
    assert all(first[s]['subset_hash']==second[s]['subset_hash'] for s in both), f'{a} and {b} saw other labels'
    if len(both)<2: return None
    d = 100*np.array([first[s]['accuracy']-second[s]['accuracy'] for s in both])
    half = stats.t.ppf(.975, len(d)-1)*d.std(ddof=1)/len(d)**.5
    return dict(mean=d.mean(), low=d.mean()-half, high=d.mean()+half, draws=len(d), wins=int((d>0).sum()))

def means(found):
    "Mean and spread over the draws for each method and budget, best first."
    groups = {}
    for f in found:      # where all labels are taken, every draw is the same, and only trainings differ
        groups.setdefault((f['n_labels'], f['method']), {})[f['subset_hash'], f['seed']*('steps' in f)] = 100*f['accuracy']
    rows = [dict(n_labels=n, method=m, mean=float(np.mean(a)), std=float(np.std(a, ddof=1)) if len(a)>1 else None, draws=len(a))
            for (n,m),each in groups.items() for a in [list(each.values())]]
    return sorted(rows, key=lambda r: (r['n_labels'], -r['mean']))

def summary(found, costs):
    "Records: costs, means beside the best method on frames, paired differences, then every single accuracy."
    rows,out = means(found),[dict(record(f'{k}: training', v, 'min', better='lower'), kind='cost') for k,v in costs.items()]
    simple = [r for r in rows if r['method'].endswith((' on frames',' on counts'))]
    best = {n:max((r for r in simple if r['n_labels']==n), key=lambda r: r['mean']) for n in {r['n_labels'] for r in simple}}
    for r in rows:
        goal = GOALS.get(r['n_labels']) if r['method']==FIRST else None
        base = best[r['n_labels']]['mean'] if r['method'] in (*ARMS,'from scratch') or ', ' in r['method'] else None
        out.append(dict(record(f"{r['method']}, {r['n_labels']} labels, mean of {r['draws']}", r['mean'], '%', base, goal), kind='mean', **r))
    for n,b in sorted(best.items()):
        pairs = [(a,o) for a in (*ARMS, f'linear probe, {OTHERS}') for o in ('from scratch',b['method'])]
        for a,o in pairs + [(f'{p}, {FIRST}',b['method']) for p in ('knn','linear probe')]:
            if d := difference(found, a, o, n):
                out.append(dict(record(f'{a} minus {o}, {n} labels', d['mean'], 'points'), kind='difference', n_labels=n, a=a, b=o, **d))
    return out + [dict(record(f"{f['method']}, {f['n_labels']} labels, seed {f['seed']}", 100*f['accuracy'], '%'), kind='draw', **f) for f in found]

def clock_file(args): return Path(args.runs)/'evidence/starts.json'

def costs(args):
    "Minutes of training that the logs of the finished parts hold."
    read = lambda folder: json.loads((folder/'log.jsonl').read_text().splitlines()[-1])['seconds']/60 if (folder/'log.jsonl').is_file() else None
    out = {f'{step}, {arm}':read(folder_of(arm, args)/step) for arm in ARMS if arm!=OTHERS or args.others for step in ('tokenizer','pretrain')}
    return {k:v for k,v in out.items() if v}

@style()
def figure(found, path):
    "Accuracy against labels."
    show = [FIRST, *[a for a in ARMS if a!=FIRST], 'from scratch', f'linear probe, {FIRST}', 'svm on frames', 'svm on counts']
    fig,ax = plt.subplots(figsize=(8.6,4), layout='constrained')
    show_label_curve([f for m in show for f in found if f['method']==m], ax=ax, title=f"Real N-MNIST, 200 held-out recordings (split {found[0]['split_hash']})\nmean ± std over draws")
    for line in ax.lines:
        if line.get_label() not in (*ARMS,'from scratch'): line.set(linestyle='--', linewidth=1.2, markersize=3)
    ax.legend(loc='center left', bbox_to_anchor=(1,.5))
    with plt.rc_context({'svg.hashsalt':'evidence'}): fig.savefig(path, metadata=dict(Date=None))
    plt.close(fig)

def save(args):
    "Write what is finished, whatever part was asked for: records and figure."
    args = argparse.Namespace(**vars(args) | dict(seeds=SEEDS, labels=None))
    found = collect(args)
    kept,trained = clock_file(args),sum('steps' in f for f in found)
    took = wall_time(kept, 'the study', 120, trained, (len(ARMS)+bool(args.others))*len(SEEDS)*len(GOALS))
    out = asked([dict(r, kind='cost') for r in took] + summary(found, costs(args)), [*args.set, *([] if args.seeds==SEEDS else ['seeds'])])
    out[0]['machine'] = (starts(kept) or [machine(args.jobs)])[-1]
    if args.json:
        write(args.json, out)
        figure(found, Path(args.json).with_suffix('.svg'))
    return out

class Task(NamedTuple):
    "A piece of the study that one process does."
    step: str       # 'frames', 'pretrain' or 'finetune'
    arm: str = ''
    labels: object = ''
    seed: int = 0
    def __str__(self): return ' '.join(str(w) for w in (self.step, self.arm, *((self.labels, f'seed {self.seed}') if self.step=='finetune' else ())) if w)

def do(args, task):
    "What a task asks for."
    if task.step=='frames': return simple_facts(args)
    if task.step=='finetune':
        cfg = config_of(task.arm, args)
        return finetune_one(cfg, *stores(cfg), method_of(task.arm), task.labels, task.seed)
    cfg = source_of(task.arm, args)
    if not cfg.pretrain.mae: tokenizer(cfg)
    pretrain(cfg)
    return frozen(task.arm, args)

def study(args):
    "Pretrain the arms, and finetune each as soon as it can be, draw after draw: stopped early, all have about the same."
    labels = args.labels or config_of(FIRST, args).finetune.labels
    tunings = lambda arm: [Task('finetune', arm, n, s) for s in args.seeds for n in labels]
    tasks = [Task('frames'), *(Task('pretrain', arm) for arm in args.arms), *(tunings('from scratch') if FIRST in args.arms else [])]
    tick,ended = clock(clock_file(args), args.jobs, len(list(Path(args.runs).glob('evidence/*/finetune/*/final.safetensors')))),[]
    for cfg in (config_of(FIRST, args), counts_config(args)): prepared(cfg)     # once, before many ask for it
    def then(task, _):
        ended.append(task)
        tick()
        if task.step=='pretrain':
            tasks.extend(tunings(task.arm))
            tasks.sort(key=lambda t: (t.step!='pretrain', t.seed))
        if len(ended)%10==0: save(args)
    try: side_by_side(partial(do, args), tasks, then, args.jobs)
    finally: tick()

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default='data/nmnist', help='folder with Train/<digit>/<id>.bin')
    parser.add_argument('--others', help='folder of recordings of other cameras, for one more arm')
    parser.add_argument('--runs', default='runs', help='where the runs lie')
    parser.add_argument('--json', help='file for the records; the figure lies beside it')
    parser.add_argument('--seeds', type=int, nargs='+', default=SEEDS, help='draws of labels')
    parser.add_argument('--labels', type=lambda n: n if n=='all' else int(n), nargs='+', help='numbers of labels, for a part of the study')
    parser.add_argument('--arms', nargs='*', default=list(ARMS), choices=list(ARMS), help='kinds of pretraining')
    parser.add_argument('--set', nargs='*', default=[], metavar='KEY=VALUE', help='settings for a trial, of which no goal is asked')
    parser.add_argument('--jobs', type=int, default=1, help='trainings at once')
    parser.add_argument('--collect', action='store_true', help='train nothing, only write down what is finished')
    args = parser.parse_args()
    if OTHERS in args.arms and not args.others: args.arms.remove(OTHERS)
    if not args.collect: study(args)
    out = save(args)
    print(table([r for r in out if r['kind']!='draw'])); print(machine(args.jobs))

if __name__=='__main__': main()
