"""The models at the paper's sizes (224×224, ViT-B/16, 8192 codes) against the plain way of computing them, and against what the machine can do.

OMP_NUM_THREADS=2 python benchmarks/models.py --json benchmarks/models.json            # two cores, batch 4: ten minutes
OMP_NUM_THREADS=2 python benchmarks/models.py --parts mem mae --no-plain               # only these, without the plain way
OMP_NUM_THREADS=1 python benchmarks/models.py --cpu-time                               # on a machine that is busy
python benchmarks/models.py --device cuda --batch 128 --parts vae tokens mem mae finetune --json benchmarks/models_gpu.json
OMP_NUM_THREADS=2 python benchmarks/models.py --parts precision                        # does bf16 train as well as fp32?

Each model has a process of its own. There one step, one large product of matrices and one large convolution are timed by turns, and the
fastest of each counts: on a machine that others use, too, only ratios within a run say something. Model FLOPs are counted once, forward and
backward, without what checkpointing computes again; a convolution is counted as it is defined. The plain way is the same model in fp32 with
attention written out, logits at all patches, all code weights at once and a plain loop for the optimiser.
"""
import argparse, contextlib, json, os, re, resource, subprocess, sys, time
from functools import partial
from pathlib import Path
import torch, torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from common import machine, record, table, write
from mem_nb.speed import compile_model, keep_memory, quick_attention, written_out_attention

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
STEPS = ('vae','tokens','mem','mae','finetune')
NAMES = dict(vae='eventVAE step', tokens='tokens', mem='MEM step with tokens', mae='MAE step', finetune='finetuning step with averaged weights')
CPU_GOALS = dict(vae=(4.2, 2.4), tokens=(.25, None), mem=(1.9, 3.2), mae=(1.2, None), finetune=(1.6, None))   # s, GB; two cores, batch 4
GPU_GOALS = dict(vae=1000, mem=2500)                                                                          # images/s of one H100

def seconds(f, device, clock=time.perf_counter):
    "Of one call."
    if device=='cuda': torch.cuda.synchronize()
    start = clock()
    f()
    if device=='cuda': torch.cuda.synchronize()
    return clock()-start

def peak_gb(device):
    "Largest memory of this process; on a GPU that of its tensors."
    if device=='cuda': return torch.cuda.max_memory_allocated()/1e9
    status = Path('/proc/self/status')   # ru_maxrss would count the parent, before exec
    own = re.search(r'VmHWM:\s*(\d+)', status.read_text()) if status.is_file() else None
    return int(own[1])*1024/1e9 if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024/1e9

# ---- what the machine can do
def ceilings(batch, device, dtype):
    "name -> (a call, its FLOPs): a product of a block of the ViT, a convolution of the eventVAE, in both layouts."
    new = partial(torch.randn, device=device, dtype=dtype)
    a,b = new(batch*197, 768),new(768, 3072)
    x,w = new(batch, 384, 56, 56),new(384, 384, 4, 4)
    last = torch.channels_last
    xl,wl,flops = x.contiguous(memory_format=last),w.contiguous(memory_format=last),2*batch*28*28*384*384*16
    conv = lambda x,w: F.conv2d(x, w, stride=2, padding=1)
    square = new(n := 8192 if device=='cuda' else 1024, n)
    return dict(matmul=(lambda: a@b, 2*len(a)*768*3072), matmul_square=(lambda: square@square, 2*n**3),
                conv=(lambda: conv(x, w), flops), conv_last=(lambda: conv(xl, wl), flops))

# ---- the steps
def vae_step(batch, device, plain):
    "One training step of the eventVAE."
    from mem_nb.tokenizer import EventVAE, gumbel_weights, kl_to_uniform, reconstruction_loss, tokenizer_loss, usage_loss
    vae,frames = EventVAE().to(device),torch.rand(batch, 3, 224, 224, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for m in vae.modules():
        if plain and isinstance(m, torch.nn.ReLU): m.inplace = False
        if plain and isinstance(m, torch.nn.ConvTranspose2d): m.least = float('inf')
    def loss():
        if not plain: return tokenizer_loss(vae, frames, 1., generator)[0]
        logits = vae.encoder(frames)
        blends = torch.einsum('bkhw,kd->bdhw', gumbel_weights(logits, 1., generator=generator), vae.codebook.weight)
        reconstruction = vae.decoder(blends.contiguous())
        return reconstruction_loss(reconstruction, frames) + 1e-10*kl_to_uniform(logits) + 2e-3*usage_loss(logits)
    return trained(vae, loss, torch.optim.Adam(vae.parameters(), 2e-4, **how(plain)), 1e-2)

def how(plain): return dict(foreach=False) if plain else dict(fused=True)

def trained(model, loss, optimizer, clip, after=lambda: None):
    "Forward and backward, and the update, as functions."
    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step(); optimizer.zero_grad(); after()
    update.model = model
    return loss,update

def tokens_step(batch, device, plain):
    "Tokens of a batch."
    from mem_nb.tokenizer import EventVAE
    vae,frames = EventVAE().to(device).eval().requires_grad_(False),torch.rand(batch, 3, 224, 224, device=device)
    def tokens(): return vae.encoder(frames).softmax(1).argmax(1) if plain else vae.tokens(frames)
    tokens.tokenizer = vae
    return tokens,None

def vit(device, plain, **kw):
    "The paper's encoder; the plain one with attention written out."
    from mem_nb.encoder import build_encoder
    encoder = build_encoder((224,224), 16, drop_path=.1, **kw).to(device)
    if plain: written_out_attention(encoder)
    return encoder

def hidden(batch, device):
    "Frames, and a mask of 98 patches each."
    from mem_nb.masking import block_mask
    return torch.rand(batch, 3, 224, 224, device=device),block_mask((14,14), 98, torch.Generator().manual_seed(0), batch).to(device)

def mem_step(batch, device, plain):
    "One step of masked event modelling, the tokens included."
    from mem_nb.pretrain import MaskedEventModel, masked_loss, pretrain_optimizer
    tokens,_ = tokens_step(batch, device, plain)
    model,(frames,mask) = MaskedEventModel(vit(device, plain), 8192).to(device),hidden(batch, device)
    def loss():
        with torch.no_grad(): target = tokens().flatten(1)
        if not plain: return masked_loss(model(frames, mask), target.view(batch, -1), mask)
        return masked_loss(model.head(model.forward_features(frames, mask)[:,1:])[mask], target, mask)
    loss.tokenizer = tokens.tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, (.9,.95), foreach=False) if plain else pretrain_optimizer(model, 5e-4, .05)
    return trained(model, loss, optimizer, 30.)

def mae_step(batch, device, plain):
    "One step of the masked autoencoder."
    from mem_nb.pretrain import MaskedAutoencoder, pixel_loss, pretrain_optimizer
    model,(frames,mask) = MaskedAutoencoder(vit(device, plain)).to(device),hidden(batch, device)
    if plain: written_out_attention(model)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, (.9,.95), foreach=False) if plain else pretrain_optimizer(model, 5e-4, .05)
    return trained(model, lambda: pixel_loss(model(frames, mask), frames, mask), optimizer, 30.)

def finetune_step(batch, device, plain):
    "One step of classification into 101 classes, with averaged weights."
    from timm.utils import ModelEmaV3
    from mem_nb.finetune import classification_loss, classifier_optimizer
    model = vit(device, plain, shared_bias=False, num_classes=101)
    frames,labels = torch.rand(batch, 3, 224, 224, device=device),torch.arange(batch, device=device)%101
    ema = ModelEmaV3(model, decay=.9999, use_warmup=True, foreach=not plain)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, foreach=False) if plain else classifier_optimizer(model, 4e-3, .05, .9)
    return trained(model, lambda: classification_loss(model, frames, labels, .1)[0], optimizer, 1e9, lambda: ema.update(model, step=1))

# ---- timing
def measure(name, batch, device, dtype, plain, repeats, compiled=False, clock=time.perf_counter):
    "In a process of its own: seconds a step, FLOPs, ceilings, memory."
    if device=='cuda': torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False   # fp32 is fp32
    if device=='cpu' and not plain: keep_memory()                     # as the training loop does
    torch.manual_seed(0)
    loss,update = globals()[f'{name}_step'](batch, device, plain)
    if update and device=='cpu' and not plain: quick_attention(update.model, dtype=='bf16')   # as the training loop does
    for m in (getattr(update, 'model', None), getattr(loss, 'tokenizer', None)):
        if compiled and m is not None: compile_model(m)
    kind = DTYPES[dtype]
    precision = partial(torch.autocast, device, kind) if kind!=torch.float32 else contextlib.nullcontext
    def step():
        with torch.set_grad_enabled(update is not None), precision(): value = loss()
        if update: value.backward(); update()
    for _ in range(2 if plain else 5): step()                         # the optimiser has its moments, the heap its size
    gb,flops = peak_gb(device),count(loss, precision, update) if not compiled else None
    limits = ceilings(batch, device, kind)
    found = {k:[] for k in ('step', *limits)}
    for _ in range(repeats):
        found['step'].append(seconds(step, device, clock))
        for k,(f,_) in limits.items(): found[k] += [seconds(f, device, clock) for _ in range(5)]
    rate = {k:n/min(found[k]) for k,(_,n) in limits.items()}
    return dict(seconds=min(found['step']), flops=flops, gb=gb, matmul=max(rate['matmul'], rate['matmul_square']),
                conv=max(rate['conv'], rate['conv_last']))

def count(loss, precision, update):
    "FLOPs of forward and backward, of convolutions as they are defined."
    from mem_nb.upsample import Upsample
    least,Upsample.least = Upsample.least,float('inf')
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(update is not None):
        with precision(): value = loss()
        if update: value.backward()
    if update: update()
    Upsample.least = least
    return counter.get_total_flops()

def in_child(name, args, plain):
    "`measure` in a process of its own; None where it fails."
    words = ['--one', name, '--device', args.device, '--batch', args.batch, '--repeats', 1 if plain else args.repeats,
             '--dtype', 'fp32' if plain else args.dtype, *(['--plain-way'] if plain else []), *(['--cpu-time'] if args.cpu_time else []),
             *(['--compile'] if args.compile and not plain else [])]
    done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True)
    if done.returncode: print(f'{name}: failed\n{done.stderr[-1500:]}'); return None
    return json.loads(done.stdout.splitlines()[-1])

def models(args, name):
    "Records of one step."
    ours = in_child(name, args, False)
    plain = (args.plain and in_child(name, args, True)) or {}
    if ours is None: return []
    what = f'{NAMES[name]}, batch {args.batch}, {args.dtype}, {args.device}' + (', compiled' if args.compile else '')
    on_cpu = args.device=='cpu' and args.batch==4
    goal_s,goal_gb = CPU_GOALS[name] if on_cpu else (None, None)
    images = lambda r: args.batch/r['seconds'] if r else None
    out = [record(f'{what}: time', ours['seconds'], 's', plain.get('seconds'), goal_s, 'lower'),
           record(f'{what}: speed', images(ours), 'images/s', images(plain), GPU_GOALS.get(name) if args.device=='cuda' else None),
           record(f'{what}: memory', ours['gb'], 'GB', plain.get('gb'), goal_gb, 'lower')]
    flops = ours['flops'] or plain.get('flops')
    if not flops: return out
    rate,kind = flops/ours['seconds'],'conv' if name in ('vae','tokens') else 'matmul'
    other = plain['flops']/plain['seconds']/1e9 if plain else None
    out += [record(f'{what}: model FLOPs', rate/1e9, 'GFLOP/s', other)]
    for k,word in (('conv','convolution'),('matmul','matmul')):
        out.append(record(f'{what}: share of the {word} ceiling, {ours[k]/1e9:.0f} GFLOP/s', 100*rate/ours[k], '%', goal=80 if k==kind else None))
    if args.device=='cuda' and name=='mem': out.append(record(f'{what}: share of 989 TFLOP/s, the bf16 peak of an H100', 100*rate/989e12, '%', goal=40))
    return out

# ---- precision
DIGITS = """
    data_set = digits
    num_digits = 600
    sensor_H = 34
    sensor_W = 34
    input_H = 32
    input_W = 32
    frame_fit = crop
    normalize_gain = 2
    rand_aug = 0
    num_mask_patches = 8
    num_layers = 3
    device = cpu"""

def digit_frames():
    "Frames of simulated digits, for training and held out."
    import tempfile
    from mem_nb.config import parse_config
    from mem_nb.data import all_frames
    from mem_nb.datasets import prepared
    from mem_nb.store import EventStore
    with tempfile.TemporaryDirectory() as tmp:
        cfg = parse_config(DIGITS, [f'runs_dir={tmp}', f'store_path={tmp}/store', f'data_path={tmp}/digits'])
        store = prepared(cfg)
        return [all_frames(EventStore(store, split), cfg.data) for split in ('train','val')]

def words(frames, device, steps=150):
    "A small eventVAE, trained in fp32: the same for both precisions."
    from mem_nb.tokenizer import EventVAE, temperature_at, tokenizer_loss
    torch.manual_seed(0)
    vae = EventVAE(3, 64, 32, 32, 3, 1).to(device)
    optimizer = torch.optim.Adam(vae.parameters(), 2e-3, fused=True)
    for k in range(steps):
        g = torch.Generator(device).manual_seed(k)
        batch = frames[torch.randint(len(frames), (32,), generator=torch.Generator().manual_seed(k))].to(device)
        loss,_ = tokenizer_loss(vae, batch, temperature_at(k, steps, 1., .3), g, usage_weight=4e-3)
        optimizer.zero_grad(); loss.backward(); torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.); optimizer.step()
    return vae

def train_small(frames, held_out, vae, dtype, seed, device, steps):
    "A small masked model, its targets in the same precision; gives loss and masked accuracy on held-out frames, by fp32 targets and fixed masks."
    from mem_nb.encoder import build_encoder
    from mem_nb.masking import random_mask
    from mem_nb.pretrain import MaskedEventModel, masked_accuracy, masked_loss, pretrain_optimizer
    from mem_nb.train import cosine_schedule
    torch.manual_seed(seed)
    model = MaskedEventModel(build_encoder((32,32), 8, width=64, depth=3, heads=2, position_start='near'), 64).to(device)
    optimizer,g = pretrain_optimizer(model, 2e-3, .05),torch.Generator().manual_seed(seed)
    precision = partial(torch.autocast, device, DTYPES[dtype], enabled=dtype!='fp32')
    for k in range(steps):
        for group in optimizer.param_groups: group['lr'] = cosine_schedule(k, steps, 2e-3, 1e-5, steps//10)
        batch,mask = frames[torch.randint(len(frames), (48,), generator=g)].to(device),random_mask((4,4), 8, g, 48).to(device)
        with precision(): loss = masked_loss(model(batch, mask), vae.tokens(batch), mask)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    batch,mask = held_out.to(device),random_mask((4,4), 8, torch.Generator().manual_seed(99), len(held_out)).to(device)
    with torch.no_grad(), precision(): logits = model.eval()(batch, mask)
    target = vae.tokens(batch)
    return float(masked_loss(logits, target, mask)),float(masked_accuracy(logits, target, mask))

def precision(args, seeds=3, steps=300):
    "The same small model in fp32 and in bf16, three seeds each: held-out loss and masked accuracy."
    import statistics
    frames,held_out = digit_frames()
    vae,found = words(frames, args.device),{}
    fp32 = vae.tokens(held_out.to(args.device))
    with torch.autocast(args.device, torch.bfloat16): same = (vae.tokens(held_out.to(args.device))==fp32).double().mean().item()
    out = [record('tokens of held-out frames that are the same in bf16 as in fp32', 100*same, '%')]
    for dtype in ('fp32','bf16'):
        found[dtype] = list(zip(*[train_small(frames, held_out, vae, dtype, s, args.device, steps) for s in range(seeds)]))
        for word,values in zip(('loss','masked accuracy'), found[dtype]):
            print(f'{dtype} {word}: {statistics.mean(values):.4f} ± {statistics.stdev(values):.4f} ({", ".join(f"{v:.4f}" for v in values)})', flush=True)
    for i,(word,unit,better) in enumerate((('loss','nats','lower'),('masked accuracy','','higher'))):
        a,b = (statistics.mean(found[d][i]) for d in ('bf16','fp32'))
        out += [record(f'held-out {word} in bf16, mean of {seeds} seeds, {steps} steps, against fp32', a, unit, b, better=better),
                record(f'the same, spread of {seeds} seeds', statistics.stdev(found['bf16'][i]), unit, statistics.stdev(found['fp32'][i]), better='lower')]
    return out

PARTS = (*STEPS,'precision')

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', nargs='+', default=PARTS, choices=PARTS)
    parser.add_argument('--device', default='cpu', choices=('cpu','cuda'))
    parser.add_argument('--batch', type=int, default=4, help='frames a step')
    parser.add_argument('--dtype', choices=tuple(DTYPES), help='default: fp32 on a CPU, bf16 on a GPU')
    parser.add_argument('--repeats', type=int, default=5, help='steps timed; the fastest counts')
    parser.add_argument('--no-plain', dest='plain', action='store_false', help='leave the plain way out')
    parser.add_argument('--compile', action='store_true', help='as compile = 1 in a configuration')
    parser.add_argument('--cpu-time', action='store_true', help='count time of the processor, not of the clock: for a busy machine and OMP_NUM_THREADS=1')
    parser.add_argument('--json', help='file for the records')
    parser.add_argument('--one', choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument('--plain-way', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ('fp32' if args.device=='cpu' else 'bf16')
    if args.one:
        print(json.dumps(measure(args.one, args.batch, args.device, args.dtype, args.plain_way, args.repeats, args.compile,
                                 time.process_time if args.cpu_time else time.perf_counter)))
        sys.exit()
    records = []
    for part in args.parts:
        records += precision(args) if part=='precision' else models(args, part)
        print(table(records[-6:]), flush=True)
        if args.json: write(args.json, records)      # a run that is cut short keeps what it has
    print(table(records)); print(machine())
    if args.json: print(f'records: {args.json}')
