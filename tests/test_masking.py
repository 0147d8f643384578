"Masks hide exactly n patches, each patch as often as any other (defect 11 of the original), in blocks where blocks are asked for."
import numpy as np, pytest, torch
from mem_nb.masking import MASKS, OUTSIDE, block_mask, draw_blocks, event_mask, make_masks, patch_events, random_mask

def seeded(seed=0): return torch.Generator().manual_seed(seed)

def same_neighbours(masks):
    "Share of neighbouring patches that are both hidden or both seen; masks `(n, h, w)`."
    return ((masks[:,1:]==masks[:,:-1]).float().mean() + (masks[:,:,1:]==masks[:,:,:-1]).float().mean())/2

@pytest.mark.parametrize('draw', [random_mask, block_mask])
@pytest.mark.parametrize('grid,n', [((14,14),98), ((14,14),1), ((14,14),5), ((14,14),195), ((8,8),32), ((30,40),600), ((1,9),4), ((9,1),4), ((2,3),5)])
def test_defect_11_exactly_n_are_hidden(draw, grid, n):
    masks = draw(grid, n, seeded(), batch=64)
    assert masks.dtype==torch.bool and masks.shape==(64, grid[0]*grid[1])
    assert (masks.sum(1)==n).all()

@pytest.mark.parametrize('draw', [random_mask, block_mask])
@pytest.mark.parametrize('grid,n', [((14,14),98), ((8,8),32), ((14,14),75), ((6,10),20)])
def test_defect_11_no_patch_is_special(draw, grid, n):
    often,share = draw(grid, n, seeded(), batch=4000).float().mean(0),n/(grid[0]*grid[1])
    spread = 5*(share*(1-share)/4000)**.5     # five standard errors
    assert (often-share).abs().max() < spread, "the last patch and the corners take their turn"

def test_masks_are_as_blocky_as_the_original(shared):
    golden = np.load(shared/'golden'/'masks.npz')
    masks = block_mask((14,14), 98, seeded(), batch=2000).view(-1,14,14)
    assert abs(float(same_neighbours(masks))-golden['block/neigh_equal']) < .03
    assert golden['block/cell_freq'].max() > 10*golden['block/cell_freq'].min()     # what is not repeated here
    assert masks.float().mean(0).max() < 1.2*masks.float().mean(0).min()

def test_blocks_keep_their_smallest_area_and_aspect():
    inside = draw_blocks((14,14), torch.full((3000,), 98.), 16, (.3,1/.3), seeded()) < OUTSIDE
    height,width = inside.any(2).sum(1),inside.any(1).sum(1)
    assert torch.equal(height*width, inside.sum((1,2))), "a rectangle, on a grid whose edges are joined"
    assert (height*width).min() >= 16 and max(height.max(), width.max()) < 14
    aspect = height/width
    assert aspect.min() > .19 and aspect.max() < 5.1 and (aspect>1).float().mean().sub(.5).abs() < .1   # rounding widens 0.3 … 3.3 a little

def test_a_single_mask_is_flat():
    assert block_mask((8,8), 20, seeded()).shape == random_mask((8,8), 20, seeded()).shape == (64,)

@pytest.mark.parametrize('kind', MASKS)
def test_the_generator_decides(kind):
    frames = torch.rand(6,3,32,32, generator=seeded())
    draw = lambda seed: make_masks(kind, (8,8), 20, 6, seeded(seed), frames)
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))

def test_event_masks_prefer_events():
    amount = torch.zeros(500,64); amount[:,:16] = 1.
    masks = event_mask(amount, 20, seeded())
    assert (masks.sum(1)==20).all()
    assert masks[:,:16].float().mean() > .7 > .3 > masks[:,16:].float().mean() > 0
    assert (event_mask(torch.zeros(3,64), 20, seeded()).sum(1)==20).all()

def test_patch_events_sum_the_polarities():
    frames = torch.rand(2,3,16,24, generator=seeded())
    want = frames[:,[0,2]].view(2,2,4,4,6,4).sum((1,3,5)).flatten(1)
    torch.testing.assert_close(patch_events(frames, 4), want)
    torch.testing.assert_close(patch_events(frames[:,:2].repeat(1,2,1,1)[:,:4], 8).sum(1), 2*frames[:,:2].sum((1,2,3)))   # any other C: all channels

@pytest.mark.parametrize('n', [0, 64, -1, 1000])
def test_a_target_that_does_not_fit_is_refused(n):
    for kind in MASKS:
        with pytest.raises(ValueError, match='can hide 1 to 63'): make_masks(kind, (8,8), n, 2, seeded(), torch.ones(2,3,32,32))

def test_mistakes_are_told():
    with pytest.raises(ValueError, match='known: block, random, event'): make_masks('blocks', (8,8), 3, 2, seeded())
    with pytest.raises(ValueError, match='frames='): make_masks('event', (8,8), 3, 2, seeded())
    with pytest.raises(ValueError, match='patches of 5'): patch_events(torch.zeros(1,3,32,32), 5)
