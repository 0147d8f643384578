"The encoder computes what the original computes, and says what does not fit."
from pathlib import Path
import numpy as np, pytest, torch
from timm.models.vision_transformer import VisionTransformer
from mem_nb.config import parse_config
from mem_nb.encoder import (attention_maps, build_encoder, config_encoder, encode_patches, features, from_patches, from_vit,
                            load_encoder, near_bias, resize_bias, share_to_block_bias, sincos_positions, to_patches)
from mem_nb.masking import hide_first
from mem_nb.pretrain import MaskedAutoencoder, MaskedEventModel
from mem_nb.train import save_weights

GOLDEN = Path(__file__).parents[2]/'shared'/'golden'
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason='golden vectors are not here')
tiny = dict(width=48, depth=3, heads=3)
TABLE = 'relative_position_bias_table'

def arrays(name): return np.load(GOLDEN/f'{name}.npz')
def tensors(z, prefix): return {k[len(prefix):]:torch.from_numpy(z[k]) for k in z.files if k.startswith(prefix) and not k.endswith('index')}
def spread(model, seed=0):
    "Random weights everywhere, position biases too."
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters(): p.data.normal_(std=.2, generator=g)
    return model.eval()

@golden
def test_classifier_equals_the_original():
    z = arrays('ft_vit')
    model = build_encoder((32,32), 8, **tiny, shared_bias=False, num_classes=10).eval()
    model.load_state_dict(tensors(z, 'sd/'))
    x = torch.from_numpy(z['x'])
    torch.testing.assert_close(model(x), torch.from_numpy(z['logits']), atol=1e-5, rtol=0)
    torch.testing.assert_close(features(model, x), torch.from_numpy(z['features']), atol=1e-5, rtol=0)

@golden
def test_class_token_variant_equals_the_original():
    z = arrays('ft_vit')
    model = build_encoder((32,32), 8, **tiny, shared_bias=False, num_classes=10, global_pool='token').eval()
    model.load_state_dict(tensors(z, 'cls/sd/'))
    torch.testing.assert_close(model(torch.from_numpy(z['x'])), torch.from_numpy(z['cls/logits']), atol=1e-5, rtol=0)

@golden
@pytest.mark.parametrize('name,size,x', [('ft4x4',32,'x'), ('ft6x6',48,'x6')])
def test_pretrained_weights_reach_the_classifier_as_in_the_original(name, size, x):
    "Shared bias copied to every block, and stretched for a larger frame."
    from argparse import Namespace
    z = arrays('finetune_convert')
    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(GOLDEN/'ckpt'/'pt_tiny.pth', weights_only=True)['model']
    state = {f'encoder.{k}':v for k,v in state.items() if k not in ('mask_token','lm_head.weight','lm_head.bias')}
    model = build_encoder((size,size), 8, **tiny, shared_bias=False, num_classes=10).eval()
    head = {'head.weight':'ft_head_w', 'head.bias':'ft_head_b', 'fc_norm.weight':'ft_fc_norm_w'}
    model.load_state_dict({k:torch.from_numpy(z[v]) for k,v in head.items()}, strict=False)
    load_encoder(model, state, grid=(4,4))
    torch.testing.assert_close(model(torch.from_numpy(z[x])), torch.from_numpy(z[f'{name}/logits']), atol=1e-5, rtol=0)

@golden
@pytest.mark.parametrize('a,b', [(14,16), (14,32), (16,14)])
def test_stretched_bias_equals_the_original(a, b):
    z = arrays('finetune_convert')
    out = resize_bias(torch.from_numpy(z[f'table_{a}to{b}/in']), (a,a), (b,b))
    torch.testing.assert_close(out, torch.from_numpy(z[f'table_{a}to{b}/out']), atol=1e-5, rtol=0)

@golden
def test_sincos_positions_equal_the_original():
    out = sincos_positions(768, (14,14))[::13, ::37]
    torch.testing.assert_close(out, torch.from_numpy(arrays('mae')['pos_embed_14_768_sub']).float(), atol=1e-6, rtol=0)

def test_patches_come_back():
    frames = torch.rand(2, 5, 12, 20)
    assert to_patches(frames, 4).shape == (2, 15, 80)
    assert torch.equal(from_patches(to_patches(frames, 4), (12,20)), frames)

def test_resized_bias_keeps_class_rows_and_goes_along_either_side():
    table = torch.randn(15*11+3, 2)
    out = resize_bias(table, (8,6), (8,9))
    assert out.shape == (15*17+3, 2) and torch.equal(out[-3:], table[-3:])
    assert resize_bias(table, (8,6), (8,6)) is table

def test_leaving_patches_out_keeps_each_its_position():
    "Bias rows and columns follow the patches, absolute positions too."
    model = spread(build_encoder((32,48), 8, **tiny, abs_pos=True))
    frames = torch.rand(3, 3, 32, 48)
    patches,whole = model.patch_embed(frames),model.forward_features(frames)
    order = torch.stack([torch.randperm(24) for _ in frames])
    out = encode_patches(model, patches.gather(1, order[...,None].expand(-1,-1,48)), order)
    torch.testing.assert_close(out[:,1:], whole[:,1:].gather(1, order[...,None].expand(-1,-1,48)), atol=1e-5, rtol=1e-5)
    few = encode_patches(model, patches[:,:5], torch.arange(5).expand(3,5))
    small = encode_patches(model, patches[:1,:5], torch.arange(5)[None])
    torch.testing.assert_close(few[:1], small, atol=1e-5, rtol=1e-5)   # the others in the batch do not matter

def test_shared_and_copied_bias_compute_the_same():
    shared = spread(build_encoder((32,32), 8, **tiny))
    blocks = build_encoder((32,32), 8, **tiny, shared_bias=False).eval()
    blocks.load_state_dict(share_to_block_bias(shared.state_dict(), 3))
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(features(blocks, x), features(shared, x), atol=1e-5, rtol=1e-5)

def test_attention_rows_sum_to_one_with_either_bias():
    for shared in (True, False):
        maps = attention_maps(spread(build_encoder((32,32), 8, **tiny, shared_bias=shared)), torch.rand(2,3,32,32), block=1)
        assert maps.shape == (2, 3, 17, 17)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2,3,17))

def test_near_start_gives_each_head_a_place_and_default_is_zero():
    table = near_bias((6,8), 5)
    assert table.shape == (11*15+3, 5) and len(table[:-3].argmax(0).unique()) == 5 and not table[-3:].any()
    assert not build_encoder((32,32), 8, **tiny).rel_pos_bias.relative_position_bias_table.any()
    model = build_encoder((32,32), 8, **tiny, shared_bias=False, position_start='near')
    for b in model.blocks: assert torch.equal(b.attn.relative_position_bias_table.data, near_bias((4,4), 3))
    with pytest.raises(ValueError, match='known: zero, near'): build_encoder((32,32), 8, **tiny, position_start='x')

def test_vit_weights_compute_the_same_here():
    vit = spread(VisionTransformer(32, 8, embed_dim=48, depth=3, num_heads=3, num_classes=7))
    model = build_encoder((32,32), 8, **tiny, abs_pos=True).eval()
    load_encoder(model, from_vit(vit.state_dict(), model))
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model.forward_features(x), vit.forward_features(x), atol=1e-4, rtol=1e-4)

def test_vit_weights_adapt_to_channels_and_frame_size():
    vit = spread(VisionTransformer(32, 8, embed_dim=48, depth=3, num_heads=3, num_classes=7))
    model = build_encoder((32,64), 8, 5, **tiny, abs_pos=True)
    load_encoder(model, from_vit(vit.state_dict(), model))
    assert model(torch.rand(1,5,32,64)).shape == (1,48)

def test_what_does_not_fit_is_named(tmp_path):
    model = build_encoder((32,32), 8, **tiny)
    file = tmp_path/'final.safetensors'
    save_weights(torch.nn.ModuleDict({'encoder':model}), file)
    kw = dict(tiny, shared_bias=False, num_classes=4)
    assert load_encoder(build_encoder((32,32), 8, **kw), file)(torch.rand(1,3,32,32)).shape == (1,4)
    for change,told in ((dict(kw, depth=4), 'missing: blocks.3'), (dict(kw, depth=2), 'extra: blocks.2'),
                        (dict(kw, width=96), r'\(48,\), the model has \(96,\)')):
        with pytest.raises(ValueError, match=told): load_encoder(build_encoder((32,32), 8, **change), file)
    with pytest.raises(ValueError, match='pass their grid'): load_encoder(build_encoder((48,48), 8, **kw), file)
    with pytest.raises(FileNotFoundError, match='mem_nb pretrain'): load_encoder(model, tmp_path/'none.safetensors')
    (tmp_path/'bad.safetensors').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='bad.safetensors'): load_encoder(model, tmp_path/'bad.safetensors')

def test_head_stays_as_it_is():
    model = spread(build_encoder((32,32), 8, **tiny, shared_bias=False, num_classes=4))
    head = model.head.weight.clone()
    load_encoder(model, spread(build_encoder((32,32), 8, **tiny), seed=1).state_dict())
    assert torch.equal(model.head.weight, head)

def test_encoder_of_a_configuration():
    "Defaults are the paper's ViT-B/16; depth and drop path follow the configuration."
    with torch.device('meta'): model = config_encoder(parse_config(''), .1)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(86e6, rel=.01)
    assert model.pos_embed is None and model.patch_embed.grid_size == (14,14) and len(model.blocks) == 12
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(.1)

def test_frames_that_are_not_made_of_patches_are_refused():
    with pytest.raises(ValueError, match='not made of patches of 8'): build_encoder((32,36), 8, **tiny)
    with pytest.raises(ValueError, match='multiple of heads'): build_encoder((32,32), 8, width=50, depth=1, heads=3)

def test_from_vit_keeps_what_is_there():
    "Weights of our own that a plain ViT has not: layer scales and position tables, also shared ones."
    for shared in (True, False):
        mine,new = (build_encoder((32,32), 8, **tiny, abs_pos=True, shared_bias=shared) for _ in range(2))
        for p in mine.parameters(): p.data.normal_()
        load_encoder(new, from_vit(mine.state_dict(), new))
        assert all(torch.equal(v, new.state_dict()[k]) for k,v in mine.state_dict().items())

def test_a_wrong_grid_is_told():
    mine = build_encoder((32,32), 8, **tiny)
    with pytest.raises(ValueError, match='position table of 52 rows is not that of 5×5 patches'): load_encoder(build_encoder((48,48), 8, **tiny), mine.state_dict(), (5,5))
    absolute = build_encoder((32,32), 8, **tiny, abs_pos=True)
    with pytest.raises(ValueError, match='pos_embed.*absolute positions, as pretrained = 1'): load_encoder(mine, absolute.state_dict())

def test_red_green_blue_become_brighter_time_darker():
    vit = spread(VisionTransformer(32, 8, embed_dim=48, depth=3, num_heads=3, num_classes=7))
    model = load_encoder(build_encoder((32,32), 8, **tiny, abs_pos=True), from_vit(vit.state_dict(), build_encoder((32,32), 8, **tiny, abs_pos=True)))
    assert torch.equal(model.patch_embed.proj.weight, vit.patch_embed.proj.weight)

def test_rgb_weights_ask_the_hub_only_for_a_fitting_encoder(monkeypatch):
    import timm
    from mem_nb.encoder import rgb_weights
    with pytest.raises(ValueError, match='pt_checkpoint'): rgb_weights(build_encoder((32,32), 8, **tiny))
    create = timm.create_model
    def offline(name, pretrained=False, **kw):
        if pretrained: raise ConnectionError('no network')
        return create(name, **kw)
    monkeypatch.setattr(timm, 'create_model', offline)
    with torch.device('meta'): paper = build_encoder((224,224), 16, abs_pos=True)
    with pytest.raises(OSError, match='vit_base_patch16_224 could not be fetched.*pt_checkpoint'): rgb_weights(paper)

@pytest.mark.parametrize('kind', ['tokens','pixels','classes'])
def test_computing_blocks_again_changes_neither_loss_nor_gradient(kind):
    torch.manual_seed(0)
    encoder = build_encoder((32,32), 8, **tiny, drop_path=.3, shared_bias=kind!='classes', num_classes=10*(kind=='classes'))
    model = dict(tokens=lambda: MaskedEventModel(encoder, 16), pixels=lambda: MaskedAutoencoder(encoder, 32, 2, 4), classes=lambda: encoder)[kind]()
    frames,mask,found = torch.rand(4,3,32,32),hide_first(torch.rand(4,16), 8),[]
    for again in (False, True):
        encoder.set_grad_checkpointing(again); model.zero_grad(); torch.manual_seed(1)   # the same paths are dropped
        loss = (model(frames) if kind=='classes' else model(frames, mask)).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0])==len(found[1])>20 and all(torch.equal(a, b) for a,b in zip(*found))

def test_the_setting_reaches_the_encoder():
    text = 'input_H = 32\ninput_W = 32\nnum_mask_patches = 2\ntransformer_emb = 48\ntransformer_heads = 3\ntransformer_depth = 2\n'
    for on in (0, 1): assert config_encoder(parse_config(f'{text}transformer_checkpointing = {on}')).grad_checkpointing == bool(on)

# ---- attention on a processor
def biased(kind, dtype=torch.float32, autocast=False):
    "Output and gradients of a block's attention: timm's own, fused or written out, or the quick one."
    from timm.models.beit import Attention
    from mem_nb.speed import QuickAttention, quick_attention, written_out_attention
    torch.manual_seed(0)
    attn = Attention(32, 4, qkv_bias=True, window_size=(3,5)).to(dtype)
    for p in attn.parameters(): torch.nn.init.normal_(p, std=.3)
    x,shared,own = (torch.randn(*size, dtype=dtype, requires_grad=True) for size in ((6,16,32), (4,16,16), (6,4,16,16)))
    if kind=='written': written_out_attention(attn)
    if kind=='quick': quick_attention(torch.nn.Sequential(attn)); assert type(attn) is QuickAttention
    found = []
    for bias in (None, shared, own):
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast): out = attn(x, shared_rel_pos_bias=bias)
        out.float().square().sum().backward()
        found += [out.detach(), *(p.grad for p in [x, *attn.parameters(), *([] if bias is None else [bias])])]
        for p in (x, *attn.parameters()): p.grad = None
    return found

def test_quick_attention_is_timms():
    quick = biased('quick', torch.float64)
    for other in ('fused', 'written'):
        for a,b in zip(quick, biased(other, torch.float64), strict=True): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

def test_quick_attention_rounds_no_worse_in_bf16():
    true,off = biased('fused', torch.float64),lambda kind: [float((a.double()-b).norm()/b.norm()) for a,b in zip(biased(kind, autocast=True), true, strict=True)]
    for quick,written in zip(off('quick'), off('written'), strict=True): assert quick < 1.3*written+1e-4

def test_quick_attention_leaves_looking_alone():
    from mem_nb.speed import quick_attention
    encoder,frames = build_encoder((16,24), 4, width=32, depth=2, heads=2).eval(),torch.rand(2, 3, 16, 24)
    with torch.no_grad(): before = encoder.forward_features(frames)
    names = list(encoder.state_dict())
    quick_attention(encoder)
    with torch.no_grad(): assert torch.equal(encoder.forward_features(frames), before) and list(encoder.state_dict())==names
