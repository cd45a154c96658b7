//! Events as a router reads them: decoded by another msgpack library, replayed into an index that
//! stays equal to the pool's.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::collections::HashSet;

use common::Random;
use kvmgr::block::events::EventFormat;
use kvmgr::block::groups::Group;
use kvmgr::block::prefix;
use kvmgr::block::{BlockPool, Request, Tables, TablesConfig};
use kvmgr::evictor;
use rmpv::Value;

const SIZE: usize = 4;

fn format(arrays: bool, groups: &[Group], capacity: usize) -> EventFormat {
    EventFormat {
        arrays,
        medium: "GPU".into(),
        block_size: SIZE,
        groups: groups.to_vec(),
        capacity,
    }
}

/// What a router knows: which (group, digest) can be found.
#[derive(Default)]
struct Shadow {
    known: HashSet<(u64, Vec<u8>)>,
    next: u64,
}

/// One event, by name or by position.
struct Fields<'a>(&'a Value);

impl Fields<'_> {
    fn get(&self, name: &str, position: usize) -> Value {
        match self.0 {
            Value::Map(map) => {
                let found = map.iter().find(|(key, _)| key.as_str() == Some(name));
                found.map_or(Value::Nil, |(_, value)| value.clone())
            }
            Value::Array(array) => array.get(position).cloned().unwrap_or(Value::Nil),
            other => panic!("an event is {other}"),
        }
    }
}

fn digests(value: &Value) -> Vec<Vec<u8>> {
    value.as_array().unwrap().iter().map(|it| it.as_slice().unwrap().to_vec()).collect()
}

impl Shadow {
    fn read(&mut self, number: u64, bytes: &[u8]) {
        assert_eq!(number, self.next, "batches are numbered without gaps");
        self.next += 1;
        let mut rest = bytes;
        let batch = rmpv::decode::read_value(&mut rest).unwrap();
        assert!(rest.is_empty());
        assert!(batch[0].is_f64());
        for event in batch[1].as_array().unwrap() {
            let fields = Fields(event);
            match fields.get("type", 0).as_str().unwrap() {
                "BlockStored" => self.stored(&fields),
                "BlockRemoved" => {
                    let group = fields.get("group_idx", 3).as_u64().unwrap_or(0);
                    for digest in digests(&fields.get("block_hashes", 1)) {
                        assert!(self.known.remove(&(group, digest)), "removed twice");
                    }
                }
                "AllBlocksCleared" => self.known.clear(),
                other => panic!("unknown event {other}"),
            }
        }
    }

    /// A router computes the digests itself, from the parent and the tokens.
    fn stored(&mut self, fields: &Fields<'_>) {
        assert_eq!(fields.get("block_size", 4).as_u64(), Some(SIZE as u64));
        assert_eq!(fields.get("medium", 6).as_str(), Some("GPU"));
        assert!(fields.get("lora_id", 5).is_nil() && fields.get("lora_name", 7).is_nil());
        let group = fields.get("group_idx", 9).as_u64().unwrap_or(0);
        let tokens = fields.get("token_ids", 3);
        let tokens: Vec<i32> =
            tokens.as_array().unwrap().iter().map(|it| it.as_i64().unwrap() as i32).collect();
        let digests = digests(&fields.get("block_hashes", 1));
        assert_eq!(tokens.len(), digests.len() * SIZE);
        let parent = fields.get("parent_block_hash", 2);
        let mut parent = match parent.as_slice() {
            Some(parent) => parent.try_into().unwrap(),
            None => prefix::root(SIZE, 0, b"events"),
        };
        for (chunk, digest) in tokens.chunks(SIZE).zip(digests) {
            parent = prefix::extend(&parent, chunk);
            assert_eq!(parent[..], digest[..]);
            assert!(self.known.insert((group, digest)), "stored twice");
        }
    }

    fn equals(&self, pool: &BlockPool) -> bool {
        let is_known = |(group, digest): &(u64, Vec<u8>)| {
            pool.find(&digest[..].try_into().unwrap(), *group as u8).is_some()
        };
        self.known.len() == pool.num_entries() && self.known.iter().all(is_known)
    }
}

#[test]
fn a_shadow_index_stays_equal() {
    let mixes: [&[Group]; 3] =
        [&[Group::Full], &[Group::Full, Group::Window(6)], &[Group::Latent, Group::Recurrent(2)]];
    for (run, groups) in mixes.iter().cycle().take(6).enumerate() {
        let mut random = Random(run as u64);
        let mut pool = BlockPool::new(40, evictor::create("lru", 40).unwrap());
        pool.listen(format(run >= 3, groups, 4));
        let config = TablesConfig { groups: groups.to_vec(), ..TablesConfig::new(SIZE) };
        let mut tables = Tables::new(config).unwrap();
        let mut shadow = Shadow::default();
        let mut live = Vec::new();
        for step in 0..3000 {
            let token = |random: &mut Random| random.pick(&[-1, 1, 200, 70_000, i32::MAX]);
            let prompt: Vec<i32> = (0..random.within(1, 20)).map(|_| token(&mut random)).collect();
            let request = Request::new(&prompt, prefix::root(SIZE, 0, b"events"));
            if let Ok(admission) = tables.admit(&mut pool, &request) {
                let rest = prompt.len() - admission.num_cached;
                tables.commit(&mut pool, &[admission.id], &[rest as u32], &[]).unwrap();
                live.push(admission.id);
            }
            if live.len() > 3 {
                let id = live.swap_remove(random.below(live.len()));
                tables.release(&mut pool, &[id]).unwrap();
            }
            if step % 500 == 499 {
                tables.release(&mut pool, &std::mem::take(&mut live)).unwrap();
                assert!(pool.clear() > 0);
            }
            if let Some((number, bytes)) = pool.publish(step as f64) {
                shadow.read(number, bytes);
            }
            assert!(shadow.equals(&pool), "step {step}");
        }
        assert!(shadow.next > 100 && pool.evictions() > 100);
        let stream = pool.events().unwrap();
        assert_eq!(stream.next_number(), shadow.next);
        let numbers = |first| stream.replay(first).map(|(number, _)| number).collect::<Vec<_>>();
        assert_eq!(numbers(0), (shadow.next - 4..shadow.next).collect::<Vec<_>>());
        assert_eq!(numbers(shadow.next - 1), [shadow.next - 1]);
        assert!(numbers(shadow.next).is_empty());
    }
}

/// The bytes of vLLM's own encoder (msgspec, omit_defaults) for the same batch.
#[test]
fn the_bytes_are_vllms() {
    let mut pool = BlockPool::new(4, evictor::create("lru", 4).unwrap());
    pool.listen(format(false, &[Group::Full], 1));
    let mut tables = Tables::new(TablesConfig::new(SIZE)).unwrap();
    let root = prefix::root(SIZE, 0, b"events");
    let tokens = [1, 300, 70_000, -1];
    let request = Request::new(&tokens, root);
    let id = tables.admit(&mut pool, &request).unwrap().id;
    tables.commit(&mut pool, &[id], &[4], &[]).unwrap();
    let digest = prefix::extend(&root, &tokens);
    let (_, bytes) = pool.publish(1.5).unwrap();
    let text = |text: &str| [&[0xA0 | text.len() as u8], text.as_bytes()].concat();
    let expected = [
        &[0x93, 0xCB, 0x3F, 0xF8, 0, 0, 0, 0, 0, 0, 0x91, 0x88][..],
        &text("type"),
        &text("BlockStored"),
        &text("block_hashes"),
        &[0x91, 0xC4, 32],
        &digest,
        &text("parent_block_hash"),
        &[0xC0],
        &text("token_ids"),
        &[0x94, 1, 0xCD, 1, 44, 0xCE, 0, 1, 0x11, 0x70, 0xFF],
        &text("block_size"),
        &[4],
        &text("lora_id"),
        &[0xC0],
        &text("medium"),
        &text("GPU"),
        &text("lora_name"),
        &[0xC0, 0xC0],
    ];
    assert_eq!(bytes, expected.concat());
}
