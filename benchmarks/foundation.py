"""What a finished run reached, from its summary.json: accuracy against the simple methods, codebook, minutes.

python benchmarks/foundation.py runs/demo runs/2026-11/nmnist --json benchmarks/foundation.json
"""
import argparse, json
from pathlib import Path
from common import machine, record, table, write

GOALS = dict(demo=dict(gain=15, minutes=6), nmnist=dict(minutes=45))  # of the run with this name

def mean_of(summary, method, labels):
    "Mean accuracy of a method at a label budget, in percent; None where it was not run."
    found = [100*r['mean'] for r in summary['table'] if r['method']==method and r['labels']==labels]
    return found[0] if found else None

def run_records(
    summary:dict,  # of one run
) -> list:
    "Records of one run: pretrained against SVM and scratch at each budget, codes in use, minutes of training."
    name = Path(summary['run']).name
    goals,out = GOALS.get(name, {}),[]
    for i,gain in enumerate(summary['gain']):
        labels = gain['labels']
        svm = mean_of(summary, 'svm', labels)
        out += [record(f'{name}: pretrained, {labels} labels, against an SVM on frames', 100*gain['pretrained'], '%', svm, svm),
                record(f'{name}: pretrained, {labels} labels, against scratch', 100*gain['pretrained'], '%', 100*gain['scratch']),
                record(f'{name}: gain over scratch, {labels} labels', 100*gain['mean'], 'points', goal=goals.get('gain') if i==0 else None)]
    if summary['tokenizer']: out.append(record(f'{name}: codes in use on validation frames', 100*summary['tokenizer']['codes_used_fraction'], '%', goal=80))
    if 'val_masked_accuracy' in (summary['pretrain'] or {}):
        out.append(record(f'{name}: hidden tokens named, against the commonest', 100*summary['pretrain']['val_masked_accuracy'], '%', 100*summary['pretrain']['val_commonest']))
    return out + [record(f'{name}: training, all steps', sum(c['minutes'] for c in summary['cost']), 'min', goal=goals.get('minutes'), better='lower')]

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', help='folders of finished runs')
    parser.add_argument('--json', help='file for the records')
    args = parser.parse_args()
    records = [r for run in args.runs for r in run_records(json.loads((Path(run)/'summary.json').read_text()))]
    print(table(records)); print(machine())
    if args.json: write(args.json, records); print(f'records: {args.json}')
