"""What makes a small encoder learn from few labels? Tries inside the training part of N-MNIST: 400 recordings to learn from, 200 others of it to judge on.

python benchmarks/recipes.py --data <folder with Train/<digit>/<id>.bin> --json benchmarks/recipes.json --jobs 2

Two tables: training from scratch (rate, length, and what else might help), and the shape of the encoder (patch, depth, class token) under a short pretraining.
All else is configs/nmnist.conf; the recordings that benchmarks/evidence.py reports on are not read. The rows of other parts, from trials done by
hand, stay in the file as they are. Stop it at any moment; the same command goes on. A row that the file has is not made again; for that, name another file.
"""
import argparse, json
from functools import partial
from pathlib import Path
from unittest.mock import patch
import numpy as np
from common import machine, side_by_side, write
from mem_nb import encoder as encoders
from mem_nb.config import load_config
from mem_nb.data import num_steps
from mem_nb.datasets import prepared
from mem_nb.encoder import build_encoder
from mem_nb.finetune import finetune_one
from mem_nb.pretrain import pretrain
from mem_nb.protocols import pretrained_encoder, simple_records
from mem_nb.store import EventStore

CONFIGS = Path(__file__).parents[1]/'configs'
DRAWS = (0,1)                      # of labels, for what is trained; probes have five
LEARNED = 400                      # recordings to learn from
STEPS = 938                        # of the short pretrainings, a quarter of the recipe's
PLAIN = 'class_scratch_layer_decay=1'
SCRATCH = {                        # what is different from scratch's settings in configs/nmnist.conf, but for its layer decay, which was found here
    'rate 1.5e-3':                    [PLAIN],
    'rate 3e-3':                      [PLAIN, 'class_scratch_lr=3e-3'],
    'rate 6e-3':                      [PLAIN, 'class_scratch_lr=6e-3'],
    'two blocks':                     [PLAIN, 'transformer_depth=2'],
    'layer decay 0.8':                [],
    'mixup 0.4':                      [PLAIN, 'class_mixup=0.4'],
    'class token':                    [PLAIN, 'class token'],
    'position bias at 0':             [PLAIN, 'transformer_position_start=zero'],
    'rate 0.8e-3':                    [PLAIN, 'class_scratch_lr=0.8e-3'],
    'layer decay 0.8, rate 3e-3':     ['class_scratch_lr=3e-3'],
    'layer decay 0.65':               ['class_scratch_layer_decay=0.65']}
LENGTHS = {100:(600,1200,2400), 50:(1200,2400), 'all':(1200,2400)}
SHAPES = {
    'patches of 4 pixels, 4 blocks':           [],
    'patches of 8 pixels (frames of 32×32)':   ['num_layers=3', 'input_H=32', 'input_W=32', 'num_mask_patches=8'],
    '2 blocks':                                ['transformer_depth=2'],
    '6 blocks':                                ['transformer_depth=6'],
    'patches of 2 pixels':                     ['num_layers=1', 'num_mask_patches=98']}

def split_list(args):
    "Every third training recording of a class is judged on, the others are learned from; the reported ones are left out."
    names = [line for line in (CONFIGS/'splits/nmnist_800.txt').read_text().split() if line.startswith('train/')]
    lines = [('val' if k%3==2 else 'train') + name[5:] for k,name in enumerate(names)]
    (out := Path(args.runs)/'recipes/split.txt').parent.mkdir(parents=True, exist_ok=True)
    if not out.is_file(): out.write_text('\n'.join(lines)+'\n')      # by the first process, before there are others
    return out

def config_of(name, words, args):
    "The study's recipe with a few settings changed, on the split of this search."
    own = [w for w in words if '=' in w]
    return load_config(CONFIGS/'nmnist.conf', [f'data_path={args.data}', f'split_file={split_list(args)}', f'runs_dir={args.runs}', 'expweek=recipes', f'expname={name}', *own])

def from_scratch(what, words, n, steps, args):
    "Mean accuracy over the draws."
    cfg = config_of(f"scratch_{list(SCRATCH).index(what)}_{steps}", [*words, f'class_min_steps={steps}'], args)
    train,val = (EventStore(prepared(cfg), part) for part in ('train','val'))
    if num_steps(len(train) if n=='all' else n, cfg.finetune.epochs, cfg.finetune.batch_size)>steps: raise ValueError(f'{n} labels have more than {steps} steps')
    pool = 'token' if 'class token' in words else 'avg'
    with patch.object(encoders, 'build_encoder', partial(build_encoder, global_pool=pool)): found = [finetune_one(cfg, train, val, 'scratch', n, s) for s in DRAWS]
    return dict(part='scratch', what=what, n_labels=found[0]['n_labels'], steps=steps, accuracy=100*float(np.mean([f['accuracy'] for f in found])), draws=len(found),
                seconds=sum(f['seconds'] for f in found), split_hash=train.split_hash)

def shape(what, words, args):
    "Probes of frozen features, and finetuning with 100 labels, after a short pretraining."
    cfg = config_of(f'shape_{list(SHAPES).index(what)}', words, args)
    train,val = (EventStore(prepared(cfg), part) for part in ('train','val'))
    cfg.pretrain.epochs = STEPS*cfg.pretrain.batch_size/len(train)
    assert num_steps(len(train), cfg.pretrain.epochs, cfg.pretrain.batch_size)==STEPS
    spent = pretrain(cfg)['seconds']
    cfg.finetune.labels,cfg.finetune.seeds = (50,100,'all'),(0,1,2,3,4)
    found = simple_records(cfg, train, val, pretrained_encoder(cfg), only=('knn on features','linear probe'))
    mean = lambda method: {str(n):100*float(np.mean([r['accuracy'] for r in found if r['method']==method and r['n_labels']==n])) for n in (50,100,len(train))}
    tuned = [finetune_one(cfg, train, val, 'pretrained', 100, s)['accuracy'] for s in DRAWS]
    return dict(part='shape', what=what, steps=STEPS, knn=mean('knn on features'), linear=mean('linear probe'), finetuned=100*float(np.mean(tuned)), draws=len(tuned), seconds=spent, split_hash=train.split_hash)

def do(args, task):
    "The row of a task: (part, what, labels, steps)."
    part,what,n,steps = task
    return from_scratch(what, SCRATCH[what], n, steps, args) if part=='scratch' else shape(what, SHAPES[what], args)

def told(task): return ' '.join(str(w) for w in task if w)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default='data/nmnist', help='folder with Train/<digit>/<id>.bin')
    parser.add_argument('--runs', default='runs', help='where the runs lie')
    parser.add_argument('--json', default='benchmarks/recipes.json', help='file of the rows, read and written')
    parser.add_argument('--only', choices=('scratch','shape'), help='one of the two tables')
    parser.add_argument('--jobs', type=int, default=1, help='trainings at once, each with its share of the cores')
    args = parser.parse_args()
    file = Path(args.json)
    rows = json.loads(file.read_text()) if file.is_file() else []
    key = lambda r: tuple(r.get(k) for k in ('part','what','n_labels','steps'))
    prepared(config_of('first', [], args))              # once, before many ask for it
    order = [*SCRATCH, *SHAPES]                         # rows of other parts stay in front, as they are
    def place(r): return (r['part'], order.index(r['what'])) if r['part'] in ('scratch','shape') else ('', 0)
    def keep(task, row):
        rows[:] = sorted([r for r in rows if key(r)!=key(row)]+[row], key=place)
        write(file, rows); print(row, flush=True)
    there = lambda part,what,n,steps: (part, what, LEARNED if n=='all' else n, steps) in map(key, rows)
    search = lambda tasks: side_by_side(partial(do, args), [t for t in tasks if not there(*t)], keep, args.jobs, told)
    if args.only!='shape':
        search([('scratch', what, 100, steps) for what in SCRATCH for steps in (LENGTHS[100] if what.startswith('rate') else (1200,))])
        best = max((r for r in rows if r['part']=='scratch' and r['n_labels']==100), key=lambda r: r['accuracy'])['what']
        search([('scratch', best, n, steps) for n in (50,'all') for steps in LENGTHS[n]])
    if args.only!='scratch': search([('shape', what, None, STEPS) for what in SHAPES])
    print(machine(args.jobs))

if __name__=='__main__': main()
