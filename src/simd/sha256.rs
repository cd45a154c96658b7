//! SHA-256's compression function along chains of 64-byte messages, one chain or two side by side.
//!
//! ```text
//! state[i] = compress(state[i - 1], message[i])        FIPS 180-4, 6.2.2, without padding
//! ```
//!
//! A compression waits for the one before it, so one chain leaves half of a CPU's SHA unit idle:
//! two chains in one loop take little longer than one. CPUs without SHA instructions and other
//! architectures go through the crate `sha2`.

#![expect(unsafe_code, reason = "SHA instructions")]

use sha2::block_api::compress256;

/// A state between messages: its eight words, big-endian as in a digest.
pub type State = [u8; 32];

/// A message of 64 bytes as little-endian words.
pub type Message = [i32; 16];

/// Runs `N` chains, 1 or 2, from `states` through `messages`, and writes the state after every
/// `every`-th message to `outs`.
///
/// Panics unless each of `outs` has one place for each `every` of its messages, and all are equally
/// long.
pub fn run<const N: usize>(
    states: [&State; N],
    messages: [&[Message]; N],
    every: usize,
    mut outs: [&mut [State]; N],
) {
    let count = outs.first().map_or(0, |out| out.len());
    assert!(every > 0 && outs.iter().all(|out| out.len() == count), "outs differ in length");
    assert!(messages.iter().all(|list| list.len() == every * count), "messages and outs differ");
    #[cfg(target_arch = "x86_64")]
    if x86::is_available() {
        // SAFETY: the CPU has the instructions.
        return unsafe { x86::run(states, messages, every, &mut outs) };
    }
    for ((state, messages), out) in states.into_iter().zip(messages).zip(outs) {
        portable(state, messages, every, out);
    }
}

/// The state after one message.
pub fn step(state: &State, message: &Message) -> State {
    let mut out = [[0; 32]];
    run([state], [std::slice::from_ref(message)], 1, [&mut out]);
    out[0]
}

fn portable(state: &State, messages: &[Message], every: usize, out: &mut [State]) {
    let mut words = [0; 8];
    for (word, bytes) in words.iter_mut().zip(state.as_chunks().0) {
        *word = u32::from_be_bytes(*bytes);
    }
    for (messages, out) in messages.chunks_exact(every).zip(out) {
        for message in messages {
            let mut block = [0; 64];
            for (bytes, word) in block.as_chunks_mut().0.iter_mut().zip(message) {
                *bytes = word.to_le_bytes();
            }
            compress256(&mut words, &[block]);
        }
        for (bytes, word) in out.as_chunks_mut().0.iter_mut().zip(words) {
            *bytes = word.to_be_bytes();
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Message, State};

    pub(super) fn is_available() -> bool {
        is_x86_feature_detected!("sha")
            && is_x86_feature_detected!("ssse3")
            && is_x86_feature_detected!("sse4.1")
    }

    /// The words of a state in the order of the instructions: ABEF and CDGH, high word first.
    type Halves = (__m128i, __m128i);

    #[target_feature(enable = "sha,ssse3,sse4.1")]
    pub(super) fn run<const N: usize>(
        states: [&State; N],
        messages: [&[Message]; N],
        every: usize,
        outs: &mut [&mut [State]; N],
    ) {
        let mut halves = [(_mm_setzero_si128(), _mm_setzero_si128()); N];
        for n in 0..N {
            halves[n] = load(states[n]);
        }
        for at in 0..outs[0].len() {
            for part in 0..every {
                let mut next = [&[0; 16]; N];
                for n in 0..N {
                    next[n] = &messages[n][at * every + part];
                }
                compress(&mut halves, next);
            }
            for n in 0..N {
                store(halves[n], &mut outs[n][at]);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "sha,ssse3,sse4.1")]
    fn load(state: &State) -> Halves {
        let (low, high) = state.split_at(16);
        // SAFETY: each half has 16 bytes.
        let (abcd, efgh) = unsafe {
            (_mm_loadu_si128(low.as_ptr().cast()), _mm_loadu_si128(high.as_ptr().cast()))
        };
        let swap = swap();
        // Words of a big-endian digest, now with A or E in the highest place.
        let abcd = _mm_shuffle_epi32::<0x1B>(_mm_shuffle_epi8(abcd, swap));
        let efgh = _mm_shuffle_epi32::<0x1B>(_mm_shuffle_epi8(efgh, swap));
        (_mm_unpackhi_epi64(efgh, abcd), _mm_unpacklo_epi64(efgh, abcd))
    }

    #[inline]
    #[target_feature(enable = "sha,ssse3,sse4.1")]
    fn store((abef, cdgh): Halves, out: &mut State) {
        let swap = swap();
        let abcd = _mm_shuffle_epi32::<0x1B>(_mm_unpackhi_epi64(cdgh, abef));
        let efgh = _mm_shuffle_epi32::<0x1B>(_mm_unpacklo_epi64(cdgh, abef));
        let (low, high) = out.split_at_mut(16);
        // SAFETY: each half has 16 bytes.
        unsafe {
            _mm_storeu_si128(low.as_mut_ptr().cast(), _mm_shuffle_epi8(abcd, swap));
            _mm_storeu_si128(high.as_mut_ptr().cast(), _mm_shuffle_epi8(efgh, swap));
        }
    }

    /// Turns the bytes of each 32-bit word around.
    #[inline]
    #[target_feature(enable = "sse2")]
    fn swap() -> __m128i {
        _mm_set_epi64x(0x0C0D_0E0F_0809_0A0B, 0x0405_0607_0001_0203)
    }

    /// One message of each chain.
    #[inline]
    #[target_feature(enable = "sha,ssse3,sse4.1")]
    fn compress<const N: usize>(halves: &mut [Halves; N], messages: [&Message; N]) {
        let (before, swap) = (*halves, swap());
        let mut words = [[_mm_setzero_si128(); 4]; N];
        for n in 0..N {
            let quarters = messages[n].as_chunks::<4>().0;
            for i in 0..4 {
                // SAFETY: a quarter has 16 bytes.
                let bytes = unsafe { _mm_loadu_si128(quarters[i].as_ptr().cast()) };
                words[n][i] = _mm_shuffle_epi8(bytes, swap);
            }
        }
        // Rounds 4i to 4i + 3, then the four words that replace the ones just used.
        macro_rules! rounds {
            ($($i:literal)*) => {
                $(for n in 0..N {
                    let w = &mut words[n];
                    let (abef, cdgh) = &mut halves[n];
                    let sum = _mm_add_epi32(w[$i % 4], constants($i));
                    *cdgh = _mm_sha256rnds2_epu32(*cdgh, *abef, sum);
                    *abef = _mm_sha256rnds2_epu32(*abef, *cdgh, _mm_shuffle_epi32::<0x0E>(sum));
                    if $i < 12 {
                        let (w1, w2, w3) = (w[($i + 1) % 4], w[($i + 2) % 4], w[($i + 3) % 4]);
                        let old = _mm_sha256msg1_epu32(w[$i % 4], w1);
                        let old = _mm_add_epi32(old, _mm_alignr_epi8::<4>(w3, w2));
                        w[$i % 4] = _mm_sha256msg2_epu32(old, w3);
                    }
                })*
            };
        }
        rounds!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
        for n in 0..N {
            halves[n].0 = _mm_add_epi32(halves[n].0, before[n].0);
            halves[n].1 = _mm_add_epi32(halves[n].1, before[n].1);
        }
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn constants(i: usize) -> __m128i {
        // SAFETY: four words from 4i on; i is at most 15.
        unsafe { _mm_loadu_si128(K[i].as_ptr().cast()) }
    }

    /// FIPS 180-4, 4.2.2.
    static K: [[u32; 4]; 16] = [
        [0x428A_2F98, 0x7137_4491, 0xB5C0_FBCF, 0xE9B5_DBA5],
        [0x3956_C25B, 0x59F1_11F1, 0x923F_82A4, 0xAB1C_5ED5],
        [0xD807_AA98, 0x1283_5B01, 0x2431_85BE, 0x550C_7DC3],
        [0x72BE_5D74, 0x80DE_B1FE, 0x9BDC_06A7, 0xC19B_F174],
        [0xE49B_69C1, 0xEFBE_4786, 0x0FC1_9DC6, 0x240C_A1CC],
        [0x2DE9_2C6F, 0x4A74_84AA, 0x5CB0_A9DC, 0x76F9_88DA],
        [0x983E_5152, 0xA831_C66D, 0xB003_27C8, 0xBF59_7FC7],
        [0xC6E0_0BF3, 0xD5A7_9147, 0x06CA_6351, 0x1429_2967],
        [0x27B7_0A85, 0x2E1B_2138, 0x4D2C_6DFC, 0x5338_0D13],
        [0x650A_7354, 0x766A_0ABB, 0x81C2_C92E, 0x9272_2C85],
        [0xA2BF_E8A1, 0xA81A_664B, 0xC24B_8B70, 0xC76C_51A3],
        [0xD192_E819, 0xD699_0624, 0xF40E_3585, 0x106A_A070],
        [0x19A4_C116, 0x1E37_6C08, 0x2748_774C, 0x34B0_BCB5],
        [0x391C_0CB3, 0x4ED8_AA4A, 0x5B9C_CA4F, 0x682E_6FF3],
        [0x748F_82EE, 0x78A5_636F, 0x84C8_7814, 0x8CC7_0208],
        [0x90BE_FFFA, 0xA450_6CEB, 0xBEF9_A3F7, 0xC671_78F2],
    ];
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest as _, Sha256};

    /// FIPS 180-4, 5.3.3.
    const INITIAL: [u32; 8] = [
        0x6A09_E667,
        0xBB67_AE85,
        0x3C6E_F372,
        0xA54F_F53A,
        0x510E_527F,
        0x9B05_688C,
        0x1F83_D9AB,
        0x5BE0_CD19,
    ];

    fn initial() -> State {
        let mut state = [0; 32];
        for (bytes, word) in state.as_chunks_mut().0.iter_mut().zip(INITIAL) {
            *bytes = word.to_be_bytes();
        }
        state
    }

    fn messages(seed: i32, count: usize) -> Vec<Message> {
        let word = |at: usize| (at as i32 ^ seed).wrapping_mul(0x9E37_79B1_u32 as i32);
        (0..count).map(|at| std::array::from_fn(|i| word(at * 16 + i))).collect()
    }

    #[test]
    fn with_padding_it_is_sha_256() {
        for count in 0..5 {
            let mut list = messages(7, count);
            let bytes: Vec<u8> =
                list.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
            let mut padding = [0; 16];
            padding[0] = 0x80;
            padding[15] = (bytes.len() as i32 * 8).swap_bytes();
            list.push(padding);
            let mut out = [[0; 32]];
            run([&initial()], [&list], list.len(), [&mut out]);
            assert_eq!(out[0], State::from(Sha256::digest(&bytes)), "{count} messages");
        }
    }

    #[test]
    fn two_chains_side_by_side_are_two_chains() {
        let (a, b) = (messages(1, 12), messages(2, 12));
        let (first, second) = (initial(), step(&initial(), &a[0]));
        for every in [1, 3] {
            let n = 12 / every;
            let (mut both, mut alone) = (vec![[0; 32]; 2 * n], vec![[0; 32]; 2 * n]);
            let (left, right) = both.split_at_mut(n);
            run([&first, &second], [&a, &b], every, [left, right]);
            portable(&first, &a, every, &mut alone[..n]);
            portable(&second, &b, every, &mut alone[n..]);
            assert_eq!(both, alone);
        }
    }
}
