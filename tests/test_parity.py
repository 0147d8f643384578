"Golden values of the original (tum-vision/mem at c60c930): training steps, schedules, parameter groups, the autoencoder."
import json
from argparse import Namespace
from pathlib import Path
import numpy as np, pytest, torch
from timm.utils import ModelEmaV3
from mem_nb.encoder import build_encoder, load_encoder, from_vit, resize_bias, to_patches
from mem_nb.finetune import classification_loss, classifier_optimizer
from mem_nb.masking import hide_first
from mem_nb.pretrain import MaskedAutoencoder, MaskedEventModel, masked_loss, pixel_loss, pretrain_optimizer
from mem_nb.train import cosine_schedule

GOLDEN = Path(__file__).parents[2]/'shared'/'golden'
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason='golden vectors are not here')
tiny = dict(width=48, depth=3, heads=3)

def arrays(name): return {k:torch.from_numpy(np.asarray(v)) for k,v in np.load(GOLDEN/f'{name}.npz').items() if v.dtype.kind in 'fiub'}
def part(z, prefix): return {k[len(prefix):]:v for k,v in z.items() if k.startswith(prefix) and not k.endswith('index')}
def near(a, b, atol=1e-5): torch.testing.assert_close(a, b.to(a.dtype), atol=atol, rtol=0)
def groups(name): return json.loads((GOLDEN/'param_groups.json').read_text())[name]

def ours(state):
    "The names of the original's pretraining model as ours."
    other = {'lm_head.weight':'head.weight', 'lm_head.bias':'head.bias', 'mask_token':'mask_token'}
    return {other.get(k, f'encoder.{k}'):v for k,v in state.items() if not k.endswith('index')}

# ---- masked event modelling
def before_the_step():
    """The weights that pt_vit.npz was recorded with. Its own `sd` are those after training (they equal `after3`), but
    pt_tiny.pth holds the same weights one AdamW step later, with the moments of that step, so the step can be undone."""
    with torch.serialization.safe_globals([Namespace]): saved = torch.load(GOLDEN/'ckpt'/'pt_tiny.pth', weights_only=True)
    state,moments = saved['model'],saved['optimizer']['state']
    for group,names in zip(saved['optimizer']['param_groups'], groups('pt').values()):
        assert group['lr']==5e-4 and group['betas']==(.9,.95)
        for i,name in zip(group['params'], names['params']):
            assert moments[i]['step']==1
            step = moments[i]['exp_avg'].double()/.1 / ((moments[i]['exp_avg_sq'].double()/.05).sqrt()+group['eps'])
            state[name] = ((state[name]+group['lr']*step)/(1-group['lr']*group['weight_decay'])).float()
    return ours(state)

@pytest.fixture
def begun():
    model = MaskedEventModel(build_encoder((32,32), 8, **tiny), 64).eval()
    model.load_state_dict(before_the_step())
    return model,arrays('pt_vit')

def test_recorded_weights_of_pretraining_are_those_after_training():
    z = arrays('pt_vit')
    assert all(torch.equal(v, part(z, 'after3/')[k]) for k,v in part(z, 'sd/').items())

def test_logits_of_hidden_and_all_patches_and_features(begun):
    m,z = begun
    with torch.no_grad():
        near(m(z['x'], z['mask']), z['logits_masked'])
        tokens = m.forward_features(z['x'], z['mask'])
        near(tokens, z['features'])
        near(m.head(tokens[:,1:]), z['logits_all'])

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_three_training_steps(begun, dtype):
    "All weights to 1e-5 where our own rounding is out of the way; in fp32 loss and norm, and the weights but for what Adam makes of rounding."
    m,z = begun
    optimizer = pretrain_optimizer(m.to(dtype).train(), 1e-3, .05)
    tokens = torch.zeros_like(z['mask'], dtype=torch.long).masked_scatter(z['mask'], z['targets'])
    for want_loss,want_norm in zip(z['train_losses'], z['train_gradnorms']):
        loss = masked_loss(m(z['x'].to(dtype), z['mask']), tokens, z['mask'])
        optimizer.zero_grad(); loss.backward()
        near(loss.detach().float(), want_loss)
        near(torch.nn.utils.clip_grad_norm_(m.parameters(), 1.).float(), want_norm)
        optimizer.step()
    after,want = m.state_dict(),ours(part(z, 'after3/'))
    apart = torch.cat([(after[k]-want[k]).abs().flatten().double() for k in want])
    # Adam divides by the gradient's size: where that is next to nothing, the rounding of a processor shows (with AVX-512 one weight is 1.14e-5 off)
    assert apart.max()<(1e-5 if dtype==torch.float64 else 2e-5) and (apart>1e-5).sum()<=1, apart.max()

# ---- masked autoencoder
@pytest.fixture
def painter():
    z = arrays('mae')
    state,encoder = part(z, 'sd/'),build_encoder((32,32), 8, width=48, depth=2, heads=3, abs_pos=True)
    own = {k:v for k,v in state.items() if not k.startswith('decoder_') and k!='mask_token'}
    m = MaskedAutoencoder(load_encoder(encoder, from_vit(own, encoder)), 32, 2, 4).eval()
    names = dict(decoder_embed='embed', decoder_blocks='blocks', decoder_norm='norm', decoder_pred='pixels')
    decoder = {names[k.split('.')[0]]+k[k.index('.'):]:v for k,v in state.items() if k.split('.')[0] in names}
    m.load_state_dict(decoder | {'mask_token':state['mask_token']}, strict=False)
    return m,z

def test_autoencoder_hides_what_its_noise_says(painter):
    "The original keeps the patches of the smallest noise; `hide_first` hides those of the lowest rank."
    m,z = painter
    for kind in ('masked','all','masked_normpix'): assert torch.equal(hide_first(-z['noise'], 8), z[f'{kind}/mask'].bool())

def test_autoencoder_loss_and_gradient(painter):
    m,z = painter
    mask = hide_first(-z['noise'], 8)
    loss = pixel_loss(m(z['x'], mask), z['x'], mask)
    near(loss.detach(), z['masked/loss'])
    for name,p in m.named_parameters(): p.requires_grad_(not any(s in name for s in ('gamma','bias_table','pos_embed')))  # ours alone
    m.zero_grad(); pixel_loss(m(z['x'], mask), z['x'], mask).backward()
    near(torch.nn.utils.clip_grad_norm_(m.parameters(), 1e9), z['masked/grad_norm'], 1e-4)

def test_switches_of_the_autoencoder(painter):
    "Normalised patches, and the loss over all patches, which is left out: a formula on top."
    m,z = painter
    with torch.no_grad(): pixels = m.forward_pixels(z['x'], mask := hide_first(-z['noise'], 8))
    target = to_patches(z['x'], 8)
    near((pixels-target).square().mean(-1).sum(), z['all/loss'], 1e-4)   # the original sums over patches and frames
    near(pixel_loss(pixels[mask], z['x'], mask, norm_pix=True), z['masked_normpix/loss'])

def test_classifier_from_an_autoencoder():
    z = arrays('mae')
    state = part(z, 'ftmae/sd/')
    m = build_encoder((32,32), 8, width=48, depth=2, heads=3, abs_pos=True, shared_bias=False, num_classes=10).eval()
    load_encoder(m, from_vit(state, m))
    own = {k:state[k] for k in ('head.weight','head.bias','fc_norm.weight','fc_norm.bias')}
    m.load_state_dict(own, strict=False)
    near(m(z['x']), z['ftmae/logits'])

# ---- finetuning
def classifier():
    z = arrays('ft_vit')
    m = build_encoder((32,32), 8, **tiny, shared_bias=False, num_classes=10)
    m.load_state_dict(part(z, 'sd/'))
    return m.eval(),z

def test_features_of_every_block():
    m,z = classifier()
    found = m.forward_intermediates(z['x'], return_prefix_tokens=True, output_fmt='NLC', intermediates_only=True)
    for (patches,first),want in zip(found, z['intermediate']): near(torch.cat([first, patches], 1), want)

def test_one_finetuning_step_with_averaged_weights():
    m,_ = classifier()
    z = arrays('ft_step')
    optimizer = classifier_optimizer(m, 4e-3, .05, .9)
    scales = {k:g['lr_scale'] for g in groups('ft_layer_decay').values() for k in g['params']}   # of twelve layers
    names = {id(p):k for k,p in m.named_parameters()}
    for g in optimizer.param_groups: g['lr'] = 4e-3*scales[names[id(g['params'][0])]]
    m.load_state_dict({'head.weight':z['before/head.weight']}, strict=False)
    ema = ModelEmaV3(m, decay=.9999)   # without the warm-up that `Trainer` gives it
    loss,_ = classification_loss(m.train(), z['x'], z['y'], .1)
    near(loss.detach(), z['label_smoothing_loss'])
    optimizer.zero_grad(); loss.backward(); optimizer.step(); ema.update(m)
    after,averaged = m.state_dict(),ema.module.state_dict()
    for k,v in part(z, 'after/').items(): near(after[k], v)
    for k,v in part(z, 'ema/').items(): near(averaged[k], v)
    near(m.eval()(z['x']).detach(), z['logits_after'])
    assert torch.equal(ema.module.blocks[0].attn.relative_position_index, z['after/blocks.0.attn.relative_position_index'])

def test_the_original_averages_its_position_indices_too():
    "A defect beyond the list: `0.9999*23 + 0.0001*23` is cut to 22 in an integer buffer, so its averaged model looks in wrong rows."
    m,_ = classifier()
    z = arrays('ft_step')
    m.load_state_dict(part(z, 'ema/'))
    right = m(z['x']).detach()
    for i,b in enumerate(m.blocks):
        shift = b.attn.relative_position_index - (wrong := z[f'ema/blocks.{i}.attn.relative_position_index'])
        assert set(shift.unique().tolist()) == {0,1}
        b.attn.relative_position_index.copy_(wrong)
    near(m(z['x']).detach(), z['logits_ema'])
    assert (right-z['logits_ema']).abs().max() > 1e-4   # ours keep their indices

def test_weight_decay_spares_what_the_original_spares():
    m,_ = classifier()
    names = {id(p):k for k,p in m.named_parameters()}
    spared = {names[id(p)] for g in classifier_optimizer(m, 1e-3, .05, .9).param_groups if not g['weight_decay'] for p in g['params']}
    assert spared == {k for g in groups('ft_layer_decay').values() if not g['weight_decay'] for k in g['params']}

@pytest.mark.parametrize('decay', [.9,.65])
def test_layer_decay_of_twelve_blocks(decay):
    "Defect 14: the original has these scales whatever the depth; here they follow it."
    z = np.load(GOLDEN/'schedules.npz')
    m = build_encoder((32,32), 8, width=12, depth=12, heads=1, shared_bias=False, num_classes=2)
    names,scale = {id(p):k for k,p in m.named_parameters()},{}
    for g in classifier_optimizer(m, 1e-3, .05, decay).param_groups: scale |= {names[id(p)]:g['lr_scale'] for p in g['params']}
    ids = dict(zip(z['layer_id_names'], z['layer_ids']))
    for name in sorted(ids.keys() & scale.keys()): assert scale[name]==pytest.approx(z[f'layer_scales_12_{decay}'][ids[name]])
    assert len(ids.keys() & scale.keys()) >= 5

def test_weight_decay_schedule_is_constant():
    z = np.load(GOLDEN/'schedules.npz')
    assert np.allclose(z['wd'], .05)   # so that AdamW's own number is enough

def test_start_of_the_classifier():
    z = np.load(GOLDEN/'ft_vit.npz')
    torch.manual_seed(0)
    m = build_encoder((32,32), 8, **tiny, shared_bias=False, num_classes=10)
    for layer,key in (('attn.proj','proj'), ('mlp.fc2','fc2'), ('attn.qkv','qkv')):
        found = [float(b.get_submodule(layer).weight.std()) for b in m.blocks]
        assert np.allclose(found, z[f'init_{key}_w_std'], rtol=.05), key

# ---- positions
def test_absolute_positions_are_stretched_as_in_the_original():
    z = arrays('finetune_convert')
    small,large = (build_encoder((s,s), 8, **tiny, abs_pos=True) for s in (32,48))
    load_encoder(large, small.state_dict() | {'pos_embed':z['abs/pos_embed_in']}, grid=(4,4))
    near(large.pos_embed.detach(), z['abs/pos_embed_out6x6'])

def test_each_side_is_stretched_by_itself():
    "Not recorded for other than square grids: so first one side, then the other, is the same as both at once."
    table = torch.randn(13*13+3, 2, generator=torch.Generator().manual_seed(0))
    both,steps = resize_bias(table, (7,7), (9,12)),resize_bias(resize_bias(table, (7,7), (9,7)), (9,7), (9,12))
    near(both, steps)
    turned = lambda t,h,w: torch.cat([t[:-3].view(2*h-1, 2*w-1, -1).transpose(0,1).flatten(0,1), t[-3:]])
    near(turned(resize_bias(table, (7,7), (9,12)), 9, 12), resize_bias(turned(table, 7, 7), (7,7), (12,9)))

def test_learning_rate_of_a_whole_run():
    z = np.load(GOLDEN/'schedules.npz')
    a = json.loads(str(z['pt_like/args']))
    found = [cosine_schedule(k, len(z['pt_like']), a['base_value'], a['final_value'], a.get('warmup_steps', 0)) for k in range(len(z['pt_like']))]
    assert np.allclose(found, z['pt_like'], rtol=1e-9)
