use super::*;
use crate::evictor;

fn pool(n: usize) -> BlockPool {
    BlockPool::new(n, evictor::create("lru", n).unwrap())
}

fn evict(pool: &mut BlockPool) -> Option<Digest> {
    let (digest, blocks) = pool.begin_eviction()?;
    for block in blocks {
        pool.finish_eviction(block);
    }
    Some(digest)
}

#[test]
fn allocation_is_all_or_nothing() {
    let mut pool = pool(4);
    let mut out = Vec::new();
    pool.allocate(3, &mut out).unwrap();
    assert_eq!(out, [BlockId(0), BlockId(1), BlockId(2)]);
    assert!(pool.allocate(2, &mut out).is_err());
    assert_eq!((out.len(), pool.num_free()), (3, 1));
    assert_eq!(pool.release(BlockId(1)), Released::Freed);
    pool.allocate(0, &mut out).unwrap();
    pool.check_integrity();
}

#[test]
fn an_entry_lives_from_register_to_eviction() {
    let mut pool = pool(4);
    let mut blocks = Vec::new();
    pool.allocate(2, &mut blocks).unwrap();
    let entry = pool.register(&[1; 32], &blocks).unwrap();
    assert!(pool.register(&[1; 32], &blocks).is_none(), "known digest");
    assert!(pool.register(&[2; 32], &blocks).is_none(), "blocks of another entry");
    assert!(pool.begin_eviction().is_none(), "held entries stay");

    pool.unhold(entry);
    for block in &blocks {
        assert_eq!(pool.release(*block), Released::Idle);
    }
    pool.check_integrity();
    assert_eq!(pool.num_idle(), 2);

    let mut held = Vec::new();
    pool.hold(pool.lookup(&[1; 32]).unwrap(), &mut held);
    assert_eq!(held, [(blocks[0], true), (blocks[1], true)]);
    assert!(pool.begin_eviction().is_none());
    pool.unhold(entry);
    held.iter().for_each(|(block, _)| _ = pool.release(*block));

    assert_eq!(evict(&mut pool), Some([1; 32]));
    assert_eq!((pool.num_free(), pool.num_idle(), pool.num_entries()), (4, 0, 0));
    pool.check_integrity();
}

#[test]
fn leaves_are_reclaimed_before_their_parents() {
    let mut pool = pool(8);
    let mut blocks = Vec::new();
    pool.allocate(3, &mut blocks).unwrap();
    let chain: Vec<_> =
        (0..3u8).map(|i| pool.register(&[i; 32], &blocks[i as usize..][..1]).unwrap()).collect();
    let free = |pool: &mut BlockPool, n: usize| {
        for i in (0..n).rev() {
            pool.unhold(chain[i]);
            pool.release(blocks[i]);
        }
    };
    free(&mut pool, 3);
    let mut held = Vec::new();
    pool.hold(chain[0], &mut held);
    free(&mut pool, 1);
    let order: Vec<_> = std::iter::from_fn(|| evict(&mut pool)).map(|digest| digest[0]).collect();
    assert_eq!(order, [2, 1, 0]);
}

#[test]
fn a_block_used_past_the_eviction_of_its_entry_is_freed_by_its_user() {
    let mut pool = pool(2);
    let mut blocks = Vec::new();
    pool.allocate(1, &mut blocks).unwrap();
    let entry = pool.register(&[9; 32], &blocks).unwrap();
    pool.unhold(entry);
    evict(&mut pool).unwrap();
    assert_eq!(pool.num_free(), 1);
    assert_eq!(pool.release(blocks[0]), Released::Freed);
    pool.check_integrity();
}
