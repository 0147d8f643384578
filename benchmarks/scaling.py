"""What more processes change: nothing in the losses, images a second, and the time to save; and a plan for 64 GPUs.

OMP_NUM_THREADS=1 python benchmarks/scaling.py --json benchmarks/scaling.json

Losses and CPU throughput come from real trainings in one and two processes, the times from a ViT-B's state on this machine's disk.
The plan is a MODEL: floating-point operations counted here, everything else assumed and printed; --step_ms replaces the
assumed step by a measured one.
"""
import argparse, json, os, statistics, tempfile, time
from contextlib import redirect_stdout
from pathlib import Path
import numpy as np, torch
from timm.utils import ModelEmaV3
from torch.utils.flop_counter import FlopCounterMode
from common import machine, record, table, write
from mem_nb.config import Config, parse_config
from mem_nb.pipeline import run_step
from mem_nb.pretrain import build_model, pretrain_optimizer
from mem_nb.processes import launch
from mem_nb.state import TrainingState, read_log, save_weights
from mem_nb.tokenizer import build_tokenizer

CONF = """
data_set = digits
num_digits = 200
sensor_H = 64
sensor_W = 64
input_H = 64
input_W = 64
slice_max_evs = 4000
num_tokens = 256
num_layers = 3
vae_hidden_dim = 32
vae_num_resnet_blocks = 1
vae_skip = 1
transformer_emb = 192
transformer_depth = 6
transformer_heads = 3
num_mask_patches = 32
pt_dropout = 0
pt_warmup_steps = 4
log_every = 1
device = cpu
expweek =
"""

def pretrained(root, name, steps, batch_size):
    "Pretrain so many steps; the lines of the log."
    torch.set_num_threads(1)
    cfg = parse_config(CONF, [f'runs_dir={root}/runs', f'data_path={root}/digits', f'vae_checkpoint={root}/vae.safetensors', f'expname={name}',
                              f'pt_batch_size={batch_size}', f'pt_epochs={max(1, round(steps*batch_size/160))}'])
    with redirect_stdout(open(os.devnull, 'w')): run_step(cfg, 'pretrain')
    return read_log(cfg.folder/'pretrain')

def cpu_records(root):
    "Losses of two processes against one, and images a second when each process has its own batch of 16."
    cfg = parse_config(CONF)
    torch.manual_seed(0); save_weights(build_tokenizer(cfg), root/'vae.safetensors')
    two = launch(pretrained, 2, root, 'two', 30, 32)
    one = launch(pretrained, 1, root, 'one', 30, 32)
    half = launch(pretrained, 1, root, 'half', 30, 16)
    loss = lambda log: np.array([r['loss'] for r in log])
    speed = lambda log: statistics.median(r['images_s'] for r in log[3:])
    ideal = 2*speed(half)
    return [record('2 processes against 1, same batches: largest relative difference of a loss', float(abs(loss(two)/loss(one)-1).max()), '', goal=1e-5, better='lower'),
            record('CPU: 1 process, 16 images a step', speed(half), 'images/s'),
            record('CPU: 2 processes, 16 images each, against 1', speed(two), 'images/s', speed(half)),
            record('CPU: 2 processes, efficiency of weak scaling', 100*speed(two)/ideal, '%')]

def state_records(root, minutes=10, repeats=3):
    "Seconds to save and to restore the state of a ViT-B in pretraining, with moments and averaged weights."
    torch.manual_seed(0)
    model = build_model(Config())
    opt = pretrain_optimizer(model, 1e-4, .05)
    for p in model.parameters(): p.grad = torch.full_like(p, 1e-3)
    opt.step(); opt.zero_grad()
    state,file,saves,loads = TrainingState(model, opt, ModelEmaV3(model, decay=.999)),root/'last'/'state.pt',[],[]
    for _ in range(repeats):
        t = time.time(); state.save(file, {}); saves.append(time.time()-t)
        t = time.time(); state.load(file, {}); loads.append(time.time()-t)
    save,load,gb = statistics.median(saves),statistics.median(loads),file.stat().st_size/1e9
    return [record(f'ViT-B, state of {gb:.2f} GB: save', save, 's', better='lower'), record('ViT-B: restore', load, 's', better='lower'),
            record(f'ViT-B: saving, share of the time at a state every {minutes} minutes', 100*save/(60*minutes), '%', goal=2, better='lower')]

# ---- the model of many GPUs
ASSUMED = dict(peak_tflops=989,       # bf16 of an H100, dense
               utilisation=.35,       # share of the peak that a ViT-B reaches in training
               fp32_tflops=67,        # of an H100: the frozen tokenizer computes in full precision
               fp32_utilisation=.6,   # share of that peak that its convolutions reach
               images_gpu=64,         # images a step and GPU
               nvlink_gb_s=300,       # of an all-reduce within a node, bytes sent and received by each GPU
               infiniband_gb_s=40,    # of a node to the others: one port of 400 Gbit/s at 80 %
               gpus_node=8,           # GPUs a node
               backward_share=2/3,    # of the encoder's time; gradients travel behind it
               bucket_mb=25,          # of gradients that travels after the backward pass has ended
               latency_us=30)         # of a message between nodes; a ring has 2(n-1) of them

def counted():
    "Operations an image, encoder forward and backward and tokenizer forward, and bytes of gradients, of the default configuration."
    cfg = Config()
    model,vae = build_model(cfg),build_tokenizer(cfg)
    frames,mask = torch.zeros(1,3,*cfg.data.input_size),torch.zeros(1, cfg.grid[0]*cfg.grid[1], dtype=bool)
    mask[:,:cfg.pretrain.num_mask_patches] = True
    def flops(f):
        with torch.no_grad(), FlopCounterMode(display=False) as counter: f()
        return counter.get_total_flops()
    return 3*flops(lambda: model(frames, mask)), flops(lambda: vae.tokens(frames)), 4*sum(p.numel() for p in model.parameters())

def step_seconds(gpus, compute, backward, grad_bytes, a):
    "One step: computing, and the part of the all-reduce that it does not hide."
    inside,nodes = min(gpus, a['gpus_node']),-(-gpus//a['gpus_node'])
    ring = lambda n, size, speed: 2*(n-1)/n*size/(speed*1e9)
    travel = lambda size: ring(inside, size, a['nvlink_gb_s']) + ring(nodes, size, a['infiniband_gb_s']) + 2*(nodes-1)*a['latency_us']*1e-6
    last = min(a['bucket_mb']*1e6, grad_bytes)
    return compute + max(0, travel(grad_bytes-last)-backward) + travel(last), travel(grad_bytes)

def plan(a, step_ms=0, samples=1_280_000, epochs=300, event_bytes=8*30_000):
    "Rows (GPUs, images/s, efficiency, all-reduce in ms, seconds of it seen, GB/s of events, hours)."
    train,tokens,grads = counted()
    encoder,vae = (a['images_gpu']*f/1e12 for f in (train/(a['peak_tflops']*a['utilisation']), tokens/(a['fp32_tflops']*a['fp32_utilisation'])))
    compute = step_ms/1e3 or encoder+vae
    backward = a['backward_share']*compute*encoder/(encoder+vae)
    rows = []
    for n in (1,2,4,8,16,32,64):
        step,travel = step_seconds(n, compute, backward, grads, a) if n>1 else (compute,0)
        speed = n*a['images_gpu']/step
        rows.append((n, n*a['images_gpu'], speed, compute/step, 1e3*travel, 1e3*(step-compute), speed*event_bytes/1e9, samples*epochs/speed/3600))
    return rows,train,tokens,grads,compute

def plan_text(rows, train, tokens, grads, compute, a, measured, samples=1_280_000, epochs=300):
    head = ['GPUs', 'batch', 'images/s', 'efficiency', 'all-reduce, ms', 'not hidden, ms', 'events read, GB/s', f'hours for {samples/1e6:.2f} M × {epochs} epochs']
    cells = [[str(n), str(b), f'{s:,.0f}', f'{100*e:.0f} %', f'{t:.1f}', f'{x:.1f}', f'{g:.2f}', f'{h:.1f}'] for n,b,s,e,t,x,g,h in rows]
    lines = '\n'.join('| '+' | '.join(r)+' |' for r in [head, ['---']*len(head), *cells])
    return (f"MODEL, NOT A MEASUREMENT: pretraining a ViT-B on 224×224 by DDP\n{lines}\n"
            f"Counted: {train/1e9:.0f} GFLOP an image for the encoder, forward and backward, {tokens/1e9:.0f} for the tokenizer, forward; {grads/1e6:.0f} MB of fp32 gradients.\n"
            f"A step computes {1e3*compute:.0f} ms ({'measured, as given' if measured else 'assumed from the utilisation'}). Assumed: {', '.join(f'{k} = {v:.3g}' for k,v in a.items())}.\n"
            "Not in it: reading and decoding events (they must keep up with the column), validation by the first process, saving, stragglers.")

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', help='file for the records')
    parser.add_argument('--step_ms', type=float, default=0., help='measured time of one step of images_gpu images on one GPU')
    parser.add_argument('--epochs', type=int, default=300, help='of pretraining, for the plan')
    for k,v in ASSUMED.items(): parser.add_argument(f'--{k}', type=type(v), default=v)
    args = parser.parse_args()
    a = {k:getattr(args, k) for k in ASSUMED}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root: records = cpu_records(Path(root)) + state_records(Path(root))
    rows,*facts = plan(a, args.step_ms, epochs=args.epochs)
    records += [record(f'MODEL: {r[0]} GPUs', r[2], 'images/s', rows[0][2]) for r in rows]
    print(table(records)); print(machine()); print(); print(plan_text(rows, *facts, a, args.step_ms, epochs=args.epochs))
    if args.json: write(args.json, records); print(f'records: {args.json}')
