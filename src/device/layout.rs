//! Sealed blocks as the kernels of `kernels/decode_q.cu` read them: what the quantizers of the host make,
//! in the order of the tensor cores' fragments. `kernels/kvm_quant.cuh` has the layout; sizes are the
//! same on both sides.

/// Tokens of a block on a device.
pub const TOKENS: usize = 64;

/// A format of sealed blocks that kernels can read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sealed {
    /// `int8`.
    Int8,
    /// `fp8(e4m3)`.
    Fp8E4m3,
    /// `int4`.
    Int4,
    /// `kivi(bits=4)` with groups of a block or more.
    Kivi4,
    /// `kivi(bits=2)` with groups of a block or more.
    Kivi2,
}

impl Sealed {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Int8, Self::Fp8E4m3, Self::Int4, Self::Kivi4, Self::Kivi2];

    /// What kernels are named after.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Fp8E4m3 => "fp8e4m3",
            Self::Int4 => "int4",
            Self::Kivi4 => "kivi4",
            Self::Kivi2 => "kivi2",
        }
    }

    /// Bits of a code.
    pub const fn bits(self) -> usize {
        match self {
            Self::Int8 | Self::Fp8E4m3 => 8,
            Self::Int4 | Self::Kivi4 => 4,
            Self::Kivi2 => 2,
        }
    }

    /// Tokens of a chunk, which is what a warp takes at a time.
    pub const fn chunk(self) -> usize {
        if self.bits() == 8 { 32 } else { 64 }
    }

    const fn is_kivi(self) -> bool {
        matches!(self, Self::Kivi4 | Self::Kivi2)
    }

    /// Bytes of what the codes of a side are scaled by.
    fn scale_bytes(self, dim: usize, is_key: bool) -> usize {
        match self {
            Self::Int8 | Self::Fp8E4m3 => 4 * TOKENS,
            Self::Int4 => 8 * TOKENS,
            Self::Kivi4 | Self::Kivi2 if is_key => 4 * dim,
            Self::Kivi4 | Self::Kivi2 => 4 * TOKENS,
        }
    }

    /// Bytes of a side of a cell of 64 tokens, here and there.
    pub fn bytes(self, dim: usize, is_key: bool) -> usize {
        TOKENS * dim * self.bits() / 8 + self.scale_bytes(dim, is_key)
    }

    /// A side of a cell as the device wants it, from the bytes that the quantizer of the host made.
    pub fn to_device(self, dim: usize, is_key: bool, host: &[u8], out: &mut [u8]) {
        assert_eq!([host.len(), out.len()], [self.bytes(dim, is_key); 2], "{}", self.name());
        let row = dim * self.bits() / 8;
        // Keys of KIVI have their scales in front; all others behind the codes of each token.
        let (head, tail) = match self.is_kivi() && is_key {
            true => (4 * dim, 0),
            false => (0, (host.len() - TOKENS * row) / TOKENS),
        };
        let token = |t: usize| &host[head + t * (row + tail)..][..row + tail];
        let code = |t: usize, channel: usize| self.code(token(t), channel);
        let mut rest = out;
        for first in (0..TOKENS).step_by(self.chunk()) {
            let codes = self.chunk() * row;
            let (words, after) = rest.split_at_mut(codes);
            words.fill(0);
            match is_key {
                true => self.put(words, self.chunk(), dim, |r, c| code(first + r, c)),
                false => self.put(words, dim, self.chunk(), |r, c| code(first + c, r)),
            }
            let scales = match head {
                0 => self.chunk() * tail,
                head => head,
            };
            let (scales, after) = after.split_at_mut(scales);
            if head > 0 {
                scales.copy_from_slice(&host[..head]);
            } else if self.is_kivi() {
                for (i, pair) in scales.chunks_exact_mut(tail).enumerate() {
                    pair.copy_from_slice(&token(first + i)[row..]);
                }
            } else {
                // All s, then all m.
                for (part, list) in scales.chunks_exact_mut(4 * self.chunk()).enumerate() {
                    for (i, number) in list.chunks_exact_mut(4).enumerate() {
                        number.copy_from_slice(&token(first + i)[row + 4 * part..][..4]);
                    }
                }
            }
            rest = after;
        }
    }

    /// The bytes of the host's quantizer from a side of a cell of the device: undoes [`Self::to_device`].
    pub fn to_host(self, dim: usize, is_key: bool, device: &[u8], out: &mut [u8]) {
        assert_eq!([device.len(), out.len()], [self.bytes(dim, is_key); 2], "{}", self.name());
        let row = dim * self.bits() / 8;
        let (head, tail) = match self.is_kivi() && is_key {
            true => (4 * dim, 0),
            false => (0, (out.len() - TOKENS * row) / TOKENS),
        };
        out.fill(0);
        let start = |t: usize| head + t * (row + tail);
        let mut rest = device;
        for first in (0..TOKENS).step_by(self.chunk()) {
            let (words, after) = rest.split_at(self.chunk() * row);
            let mut add = |t: usize, channel: usize, code: u32| {
                self.add_code(&mut out[start(first + t)..][..row], channel, code);
            };
            match is_key {
                true => self.get(words, self.chunk(), dim, &mut add),
                false => self.get(words, dim, self.chunk(), &mut |r, c, code| add(c, r, code)),
            }
            let scales = if head > 0 { head } else { self.chunk() * tail };
            let (scales, after) = after.split_at(scales);
            if head > 0 {
                out[..head].copy_from_slice(scales);
            } else if self.is_kivi() {
                for (i, pair) in scales.chunks_exact(tail).enumerate() {
                    out[start(first + i) + row..][..tail].copy_from_slice(pair);
                }
            } else {
                for (part, list) in scales.chunks_exact(4 * self.chunk()).enumerate() {
                    for (i, number) in list.chunks_exact(4).enumerate() {
                        let at = start(first + i) + row + 4 * part;
                        out[at..at + 4].copy_from_slice(number);
                    }
                }
            }
            rest = after;
        }
    }

    /// The code of a channel in a row of the host: blocks of 32 channels.
    fn code(self, row: &[u8], channel: usize) -> u32 {
        let (block, j) = (channel / 32, channel % 32);
        u32::from(match self {
            Self::Int8 => row[channel].wrapping_add(128),
            Self::Fp8E4m3 => row[channel],
            Self::Int4 | Self::Kivi4 => row[block * 16 + j % 16] >> (j / 16 * 4) & 15,
            Self::Kivi2 => row[block * 8 + j % 8] >> (j / 8 * 2) & 3,
        })
    }

    /// Sets the code of a channel in a row of the host, which is 0.
    fn add_code(self, row: &mut [u8], channel: usize, code: u32) {
        let (block, j, code) = (channel / 32, channel % 32, code as u8);
        match self {
            Self::Int8 => row[channel] = code.wrapping_sub(128),
            Self::Fp8E4m3 => row[channel] = code,
            Self::Int4 | Self::Kivi4 => row[block * 16 + j % 16] |= code << (j / 16 * 4),
            Self::Kivi2 => row[block * 8 + j % 8] |= code << (j / 8 * 2),
        }
    }

    /// Writes a matrix of codes as fragments of a left operand.
    fn put(self, out: &mut [u8], rows: usize, columns: usize, code: impl Fn(usize, usize) -> u32) {
        self.fragments(rows, columns, |row, column, at, bit| {
            let placed = code(row, column).rotate_left(bit).to_le_bytes();
            for (byte, more) in out[at..at + 4].iter_mut().zip(placed) {
                *byte |= more;
            }
        });
    }

    /// Reads what [`Self::put`] wrote: row, column and code of each element.
    fn get(
        self,
        words: &[u8],
        rows: usize,
        columns: usize,
        out: &mut dyn FnMut(usize, usize, u32),
    ) {
        self.fragments(rows, columns, |row, column, at, bit| {
            let word = u32::from_le_bytes([0, 1, 2, 3].map(|i| words[at + i]));
            out(row, column, word.rotate_right(bit) & ((1 << self.bits()) - 1));
        });
    }

    /// Visits the elements of a matrix: row, column, the first byte of the word that holds the code, and
    /// the bit at which it starts there.
    fn fragments(
        self,
        rows: usize,
        columns: usize,
        mut visit: impl FnMut(usize, usize, usize, u32),
    ) {
        let words = columns * self.bits() / 64; // of a lane, for a tile of 16 rows
        let width = words.min(4);
        for (tile, step, lane) in places(rows / 16, columns / 16) {
            for element in 0..8 {
                let (register, low) = (element / 2, element % 2);
                let row = tile * 16 + lane / 4 + 8 * (register % 2);
                let column = step * 16 + lane % 4 * 2 + low + 8 * (register / 2);
                let (word, bit) = match self.bits() {
                    8 => (2 * step + register / 2, 8 * (register % 2 * 2 + low)),
                    4 => (step, 2 + 16 * low + 4 * (register % 2) + 8 * (register / 2)),
                    _ => {
                        let bit = 2 + 16 * low + 2 * (register % 2) + 8 * (register / 2);
                        (step / 2, bit + 4 * (step % 2))
                    }
                };
                let piece = tile * (words / width) + word / width;
                let at = ((piece * 32 + lane) * width + word % width) * 4;
                visit(row, column, at, bit as u32);
            }
        }
    }
}

fn places(tiles: usize, steps: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let place = move |i: usize| (i / (steps * 32), i / 32 % steps, i % 32);
    (0..tiles * steps * 32).map(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_and_scale_has_one_place() {
        for format in Sealed::ALL {
            for (dim, is_key) in
                [64, 128, 256].into_iter().flat_map(|dim| [(dim, true), (dim, false)])
            {
                let bytes = format.bytes(dim, is_key);
                let bits = |list: &[u8]| list.iter().map(|byte| byte.count_ones()).sum::<u32>();
                let convert = |host: &[u8]| {
                    let mut out = vec![0xAA; bytes];
                    format.to_device(dim, is_key, host, &mut out);
                    out
                };
                let base = convert(&vec![0; bytes]);
                let host: Vec<u8> = (0..bytes).map(|i| (i * 151 % 253) as u8).collect();
                let mut back = vec![0x55; bytes];
                format.to_host(dim, is_key, &convert(&host), &mut back);
                assert!(back == host, "{format:?} {dim} {is_key}: there and back again");
                for bit in (0..bytes * 8).step_by(37) {
                    let mut host = vec![0; bytes];
                    host[bit / 8] = 1 << (bit % 8);
                    let changed: Vec<u8> =
                        convert(&host).iter().zip(&base).map(|(a, b)| a ^ b).collect();
                    assert!(bits(&changed) >= 1, "{format:?} {dim} {is_key}: bit {bit} is lost");
                    let place = changed.iter().filter(|byte| **byte != 0).count();
                    assert_eq!(place, 1, "{format:?} {dim} {is_key}: bit {bit}");
                }
            }
        }
    }
}
