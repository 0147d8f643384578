"Looks inside an encoder: what is drawn is what the encoder computes with."
import matplotlib.pyplot as plt, pytest, torch
from mem_nb.encoder import attention_maps, build_encoder
from mem_nb.inside import attention_from, bias_maps, nearest, show_attention, show_bias, show_neighbours

def encoder(shared_bias=True):
    torch.manual_seed(0)
    return build_encoder((16,24), 4, width=24, depth=2, heads=2, shared_bias=shared_bias, position_start='near').eval()

@pytest.mark.parametrize('block', [0,1])
def test_attention_of_a_patch_is_its_row(block):
    e,frame = encoder(),torch.rand(3,16,24)
    maps = attention_from(e, frame, (2,5), block)
    assert maps.shape==(2,4,6)
    assert torch.equal(maps.flatten(1), attention_maps(e, frame[None], block)[0,:,1+2*6+5,1:])
    with pytest.raises(ValueError, match='outside the grid of 4×6'): attention_from(e, frame, (4,0))

@pytest.mark.parametrize('shared_bias', [True, False])
def test_bias_maps_hold_what_attention_adds(shared_bias):
    e = encoder(shared_bias)
    added = (e.rel_pos_bias() if shared_bias else e.blocks[1].attn._get_rel_pos_bias()).reshape(2,25,25)[:,1:,1:].unflatten(1,(4,6)).unflatten(3,(4,6))
    maps = bias_maps(e, 1)
    assert maps.shape==(2,7,11)
    for y,x,v,u in ((0,0,3,5), (3,5,0,0), (1,4,2,1)): assert torch.equal(maps[:,3+v-y,5+u-x], added[:,y,x,v,u])

def test_an_encoder_without_bias_is_told():
    from timm.models.beit import Beit
    with pytest.raises(ValueError, match='no relative position bias'): bias_maps(Beit(16, 4, embed_dim=24, depth=1, num_heads=2))

def test_nearest_is_by_direction_and_in_order():
    bank = torch.tensor([[1.,0],[0,1],[1,1],[-1,0]])
    index,alike = nearest(torch.tensor([[5.,.1]]), bank, 4)
    assert index.tolist()==[[0,2,1,3]] and (alike.diff()<=0).all()
    with pytest.raises(ValueError, match='1…4'): nearest(bank, bank, 5)

def test_pictures_have_a_panel_a_head_and_a_neighbour():
    e,frames = encoder(),torch.rand(3,3,16,24)
    assert len(show_attention(frames[0], attention_from(e, frames[0], (0,0)), (0,0)).axes)==3
    assert len(show_bias(bias_maps(e)).axes)==3                # two heads and the scale
    assert len(show_neighbours(frames[:1], frames, *nearest(e(frames[:1]).detach(), e(frames).detach(), 2)).axes)==3
    plt.close('all')
