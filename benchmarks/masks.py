"""Which masks, and which question about what they hide? Real N-MNIST: 600 recordings to pretrain on, 100 labels, 200 recordings to report on.

python benchmarks/masks.py --data <folder with Train/<digit>/<id>.bin> --json benchmarks/masks.json --jobs 2

Each of three seeds decides everything: tokenizer, weights, masks, the draw of the labels. Frames, encoder and number of hidden patches are those of
configs/nmnist.conf in every arm; steps are two fifths of its, since there are twelve pretrainings. Stop it at any moment; the same
command goes on, and the records hold what is finished. Nothing is tuned here.
"""
import argparse, json
from functools import partial
from pathlib import Path
import numpy as np
from common import machine, record, side_by_side, table, write
from mem_nb.config import load_config
from mem_nb.datasets import prepared
from mem_nb.finetune import finetune_one
from mem_nb.pretrain import pretrain
from mem_nb.protocols import linear_probe
from mem_nb.state import is_done
from mem_nb.store import EventStore
from mem_nb.tokenizer import tokenizer

CONF = Path(__file__).parents[1]/'configs/nmnist.conf'
ARMS = {'tokens, random masks':['masking=random', 'mae=0'], 'tokens, block masks':['masking=block', 'mae=0'], 'tokens, event-aware masks':['masking=event', 'mae=0'],
        'pixels (MAE), random masks':['masking=random', 'mae=1']}
STEPS = ['pt_hidden=1', 'pt_contrast=0', 'pt_epochs=160', 'pt_warmup_steps=60']        # 1500 steps, which ask for what is hidden and for nothing else

def config_of(arm, seed, args):
    "One arm of one seed; the arms of a seed share its tokenizer."
    name = f'arm{list(ARMS).index(arm)}_seed{seed}'
    words = [f'data_path={args.data}', f'runs_dir={args.runs}', 'expweek=masks', f'expname={name}', f'seed={seed}', 'class_labels=100', f'class_seeds={seed}', *STEPS, *ARMS[arm]]
    shared = Path(args.runs)/f'masks/arm0_seed{seed}/tokenizer/final.safetensors'
    if arm!=next(iter(ARMS)) and 'mae=1' not in words: words += ['vae_skip=1', f'vae_checkpoint={shared}']
    return load_config(CONF, words+args.set)

def train(cfg):
    "All that one arm of one seed needs; what is finished is left as it is."
    if not is_done(cfg.folder/'pretrain'): pretrain(cfg)
    linear_probe(cfg)
    folder = prepared(cfg)
    finetune_one(cfg, EventStore(folder), EventStore(folder, 'val'), 'pretrained', 100, cfg.run.seed)

def do(args, task):
    "A tokenizer, which comes first, or all else of an arm and seed."
    arm,seed = task
    return tokenizer(config_of(next(iter(ARMS)), seed, args)) if arm=='tokenizer' else train(config_of(arm, seed, args))

def results(args):
    "Accuracy of each method in each arm and seed that is finished."
    found = {}
    for arm in ARMS:
        for s in args.seeds:
            cfg = config_of(arm, s, args)
            probe,done = cfg.folder/'probes/linear_probe.json',cfg.folder/f'finetune/pretrained_100_seed{s}/final.json'
            if not (probe.is_file() and done.is_file()): continue
            linear = next(r['accuracy'] for r in json.loads(probe.read_text()) if r['method']=='linear probe')
            found[arm,s] = dict(linear=linear, finetuned=json.loads(done.read_text())['metrics']['val_accuracy'],
                                minutes=json.loads((cfg.folder/'pretrain/final.json').read_text())['metrics']['seconds']/60)
    return found

def records(found, args):
    "Mean and spread over the seeds, beside the first arm's mean."
    out,words = [],dict(linear='linear probe', finetuned='finetuned')
    for k,word in words.items():
        mean = {}
        for arm in ARMS:
            values = [100*found[arm,s][k] for s in args.seeds if (arm,s) in found]
            if not values: continue
            mean[arm],name = float(np.mean(values)),f'{arm}: {word}, 100 labels'
            out.append(dict(record(f'{name}, mean of {len(values)} seeds', mean[arm], '%', mean.get(next(iter(ARMS)))), draws=values))
            if len(values)>1: out.append(record(f'{name}, spread', float(np.std(values, ddof=1)), 'points', better='lower'))
    return out + [record(f'{arm}, seed {s}: pretraining', f['minutes'], 'min', better='lower') for (arm,s),f in found.items()]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default='data/nmnist', help='folder with Train/<digit>/<id>.bin')
    parser.add_argument('--runs', default='runs', help='where the runs lie')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    parser.add_argument('--set', nargs='*', default=[], metavar='KEY=VALUE', help='settings for a trial; not for the record')
    parser.add_argument('--json', help='file for the records')
    parser.add_argument('--jobs', type=int, default=1, help='trainings at once, each with its share of the cores')
    args = parser.parse_args()
    prepared(config_of(next(iter(ARMS)), 0, args))      # once, before many ask for it
    tokens = [arm for arm in ARMS if 'mae=1' not in ARMS[arm]]
    tasks = [('tokenizer', s) for s in args.seeds] + [(arm, s) for s in args.seeds for arm in ARMS if arm not in tokens]
    def then(task, _):
        if task[0]=='tokenizer': tasks[:0] = [(arm, task[1]) for arm in tokens]
        elif args.json: write(args.json, records(results(args), args))
    side_by_side(partial(do, args), tasks, then, args.jobs, lambda t: f'{t[0]}, seed {t[1]}')
    out = records(results(args), args)
    print(table(out)); print(machine(args.jobs))

if __name__=='__main__': main()
