//! What is refused: by the library, and by the driver that stands in.

use std::ffi::{CStr, c_void};
use std::ptr;

use kvmgr::ffi::attention::*;
use kvmgr::ffi::cache::*;
use kvmgr::ffi::sequence::*;
use kvmgr::ffi::types::*;

use crate::driver::{self, Buffer, Context, Stream, on_device};
use crate::twin::{PLAIN, Twin, message, ok};

/// The stand-in is as strict as a driver, or these tests would say little.
#[test]
fn the_mock_driver_notices_misuse() {
    on_device("refused::the_mock_driver_notices_misuse", || {
        if driver::is_mock() {
            driver::misuse();
        }
    });
}

/// Every request that a device cannot serve is refused with what it is and the limit.
#[test]
fn what_a_device_cannot_do_is_said() {
    on_device("refused::what_a_device_cannot_do_is_said", || {
        let context = Context::new();
        refuse_configurations();
        let twin = Twin::new(PLAIN, 3, |_| {});
        let (pair, _) = twin.start(&[]);
        ok(kvmgr_sequence_reserve(pair.device, 2));
        twin.device.plan(&[pair.device], &[2]);
        let buffer = Buffer::new(1 << 16);
        let good = PLAIN.tensor(buffer.pointer(), 2, 2, true);
        let host = PLAIN.tensor(buffer.pointer(), 2, 2, false);
        let moved = |bytes: usize| buffer.pointer().wrapping_byte_add(bytes);
        let bad = [
            (host, "key.device_type is CPU, the cache is on CUDA device 0"),
            (kvmgr_tensor { device_id: 3, ..good }, "key.device_id is 3"),
            (kvmgr_tensor { data: moved(8), ..good }, "key.data is not aligned to 16 bytes"),
            (kvmgr_tensor { strides: [130, 65, 1, 0], ..good }, "key.strides[0] is 130"),
            (kvmgr_tensor { data: ptr::null_mut(), ..good }, "key.data is NULL"),
        ];
        for (tensor, text) in bad {
            // SAFETY: live handles; bad tensors are refused unread.
            let status = unsafe {
                kvmgr_attention_append(
                    twin.device.attention,
                    0,
                    &raw const tensor,
                    &raw const good,
                    0,
                    1,
                )
            };
            assert!(status != KVMGR_OK && message().contains(text), "{text}: {}", message());
        }
        // SAFETY: live handles; the tensor is refused unread.
        let status = unsafe {
            kvmgr_attention_append(twin.host.attention, 0, &raw const good, &raw const good, 0, 1)
        };
        assert_eq!(status, KVMGR_UNSUPPORTED, "{}", message());
        // SAFETY: live handles and tensors of the right size.
        unsafe {
            ok(kvmgr_attention_append(
                twin.device.attention,
                0,
                &raw const good,
                &raw const good,
                1,
                2,
            ));
            let run = |options: &kvmgr_attention_options| {
                let (q, o) =
                    (PLAIN.tensor(moved(8192), 2, 8, true), PLAIN.tensor(moved(0), 2, 8, true));
                kvmgr_attention_run(
                    twin.device.attention,
                    0,
                    &raw const q,
                    &raw const o,
                    ptr::null(),
                    options,
                    0,
                    1,
                )
            };
            let mut options = twin.options(0, ptr::null_mut());
            assert_eq!(run(&options), KVMGR_INVALID_STATE, "only worker 0 appends");
            ok(kvmgr_attention_append(
                twin.device.attention,
                0,
                &raw const good,
                &raw const good,
                0,
                2,
            ));
            ok(run(&options));
            options.alibi_slopes = moved(0).cast();
            assert_eq!(run(&options), KVMGR_UNSUPPORTED, "{}", message());
            let status = kvmgr_sequence_append(pair.device, 1, &raw const good, &raw const good);
            assert_eq!(status, KVMGR_UNSUPPORTED, "{}", message());
            assert_eq!(kvmgr_cache_set_stream(twin.host.cache, ptr::null_mut()), KVMGR_UNSUPPORTED);
            let mut key = 0;
            let status = kvmgr_attention_graph_key(twin.host.attention, &raw mut key);
            assert_eq!(status, KVMGR_UNSUPPORTED, "{}", message());
        }
        assert!(context.is_current());
        // The stream of a context that the cache does not work in.
        let other = Context::new();
        let stream = Stream::new();
        ok(kvmgr_cache_set_stream(twin.device.cache, stream.pointer()));
        // SAFETY: live handles and tensors of the right size.
        let status = unsafe {
            let good = &raw const good;
            kvmgr_attention_append(twin.device.attention, 0, good, good, 0, 1)
        };
        assert_eq!(status, KVMGR_DEVICE_ERROR, "{}", message());
        assert!(other.is_current());
        ok(kvmgr_cache_set_stream(twin.device.cache, ptr::null_mut()));
        drop((stream, other));
        assert!(context.is_current());
    });
}

fn refuse_configurations() {
    type Edit = Box<dyn FnOnce(&mut kvmgr_cache_config)>;
    let spec = |text: &'static CStr, dim: u32, block: u32| -> Edit {
        Box::new(move |config| {
            config.spec = text.as_ptr();
            (config.head_dim, config.block_size) = (dim, block);
        })
    };
    let bad: [(Edit, &str); 21] = [
        (Box::new(|config| config.head_dim = 80), "head_dim is 80"),
        (Box::new(|config| config.block_size = 128), "block_size is 128"),
        (Box::new(|config| config.num_q_heads = 34), "17 query heads"),
        (Box::new(|config| config.dtype = KVMGR_DTYPE_F32), "dtype is f32"),
        (Box::new(|config| config.device_id = 7777), "device_id is 7777"),
        (Box::new(|config| config.device_id = -1), "device_id is -1"),
        (spec(c"h2o | keep(0.5) | quant(int8)", 64, 64), "column 1: h2o needs COLUMN_SUM"),
        (spec(c"expected | keep(0.5)", 64, 16), "column 1: expected needs"),
        (spec(c"shadowkv(8)", 64, 16), "column 1: shadowkv selects blocks"),
        (
            spec(c"knorm | keep(0.5) | quest(8)", 64, 16),
            "column 21: quest selects blocks of a policy",
        ),
        (spec(c"quant(int8, first=64) | quest(8)", 64, 64), "quest selects blocks of two formats"),
        (spec(c"stream(sink=4, recent=20) | pos(cache_relative)", 64, 16), "pos needs ROPE"),
        (spec(c"knorm | keep(0.5) | d2o", 64, 16), "column 21: d2o"),
        (spec(c"knorm | keep(0.5) | demote(int4) | quant(int8)", 64, 64), "demoted"),
        (spec(c"quant(q5_1)", 64, 64), "q5_1"),
        (spec(c"quant(k=int4, v=int8)", 64, 64), "both must be the same, or int8 and int4"),
        (spec(c"quant(kivi(bits=4))", 64, 64), "kivi with group at least 64"),
        (spec(c"quant(int4)", 64, 16), "block_size is 16, must be 64"),
        (spec(c"quant(kivi(bits=2, group=128))", 256, 64), "kivi with group at least 64"),
        (Box::new(|config| config.memory = ptr::without_provenance_mut(256)), "memory_limit is 0"),
        (
            Box::new(|config| {
                config.memory = ptr::from_mut(config).cast::<c_void>();
                config.memory_limit = 1 << 20;
            }),
            "memory is not memory of CUDA device 0",
        ),
    ];
    for (edit, text) in bad {
        PLAIN.config(|mut config| {
            config.device_type = KVMGR_DEVICE_CUDA;
            edit(&mut config);
            let mut cache = ptr::null_mut();
            // SAFETY: readable settings and a place for a pointer.
            let status = unsafe { kvmgr_cache_create(&raw const config, &raw mut cache) };
            assert!(status != KVMGR_OK && cache.is_null(), "{text}");
            assert!(message().contains(text), "{text}: {}", message());
        });
    }
}
