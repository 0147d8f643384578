"Doubling by fewer products is a transposed convolution."
import pytest, torch, torch.nn.functional as F
from torch import nn
from mem_nb.tokenizer import EventVAE
from mem_nb.upsample import Upsample, joined_conv, pointwise

@pytest.mark.parametrize('size', [(14,14),(5,9),(1,1),(2,3)])
@pytest.mark.parametrize('last', [False,True])
def test_outputs_and_gradients_are_those_of_torch(size, last, monkeypatch):
    monkeypatch.setattr(Upsample, 'least', 0)
    torch.manual_seed(0)
    ours,torchs,found = Upsample(128, 136),nn.ConvTranspose2d(128, 136, 4, 2, 1),[]
    torchs.load_state_dict(ours.state_dict())
    x,weight = torch.randn(2,128,*size),torch.randn(2,136,2*size[0],2*size[1])
    if last: x = x.contiguous(memory_format=torch.channels_last)
    for layer in (ours, torchs):
        x = x.detach().requires_grad_()
        y = layer(x)
        found.append([y.detach(), *torch.autograd.grad((y*weight).sum(), [x, *layer.parameters()])])
    for a,b in zip(*found): torch.testing.assert_close(a/b.abs().max(), b/b.abs().max(), rtol=0, atol=5e-6)

def test_the_tokenizer_decodes_the_same_by_either(monkeypatch):
    torch.manual_seed(0)
    vae,tokens = EventVAE(3, 32, 16, 128, 2, 1),torch.randint(32, (3,24))
    plain = vae.decode(tokens, (4,6)).detach()
    monkeypatch.setattr(Upsample, 'least', 0)
    torch.testing.assert_close(vae.decode(tokens, (4,6)).detach(), plain, rtol=0, atol=1e-5)

def test_small_frames_and_half_precision_take_the_usual_way():
    layer,x = Upsample(128, 128),torch.randn(1,128,4,4)
    assert 'Double' not in type(layer(x).grad_fn).__name__
    with torch.autocast('cpu', torch.bfloat16): assert layer(x).dtype==torch.bfloat16

def test_pointwise_is_a_convolution():
    conv,x = nn.Conv2d(8, 3, 1),torch.randn(2,8,5,6)
    for format in (torch.contiguous_format,torch.channels_last):
        torch.testing.assert_close(pointwise(x.contiguous(memory_format=format), conv), conv(x))

def stretched(maps, conv): return conv(torch.cat([F.interpolate(x, maps[0].shape[2:], mode='bilinear', align_corners=False) for x in maps], 1))

def joined(sizes, chans=(3,5,2,4), out=6, bias=True, kind=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(2,c,*s, dtype=kind, requires_grad=True) for c,s in zip(chans, sizes)],nn.Conv2d(sum(chans[:len(sizes)]), out, 3, padding=1, bias=bias, dtype=kind)

@pytest.mark.parametrize('bias', [False,True])
@pytest.mark.parametrize('sizes', [((16,24),(8,12),(4,6),(2,3)), ((13,20),(7,10),(4,5),(2,3)), ((5,4),(5,4),(3,7),(1,1)), ((1,1),(1,1))])
def test_maps_are_convolved_before_they_are_stretched(sizes, bias):
    maps,conv = joined(sizes, bias=bias)
    a,b = joined_conv(maps, conv),stretched(maps, conv)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    given,asked = torch.randn_like(a),[*maps, *conv.parameters()]
    for x,y in zip(torch.autograd.grad(a, asked, given), torch.autograd.grad(b, asked, given)): torch.testing.assert_close(x, y, rtol=0, atol=1e-11)

def test_in_half_precision_stretching_late_is_not_half_as_exact():
    maps,conv = joined(((32,48),(16,24),(8,12),(4,6)), (32,)*4, 32, kind=torch.float32)
    true = stretched(maps, conv)
    with torch.autocast('cpu', torch.bfloat16): a,b = joined_conv(maps, conv),stretched(maps, conv)
    assert a.dtype==b.dtype==torch.bfloat16
    off = [(x.float()-true).square().mean().sqrt().item() for x in (a,b)]
    assert off[0] < 2*off[1] < .01*true.square().mean().sqrt()
