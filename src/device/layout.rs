//! Sealed blocks as the kernels of `kernels/decode_q.cu` read them: what the quantizers of the host make,
//! in the order of the tensor cores' fragments. `kernels/kvm_quant.cuh` has the layout; sizes are the
//! same on both sides.

/// Tokens of a block on a device.
pub const TOKENS: usize = 64;

/// Codes of a side that kernels can read, with what they are scaled by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codes {
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

/// A format of sealed blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sealed {
    /// Of keys.
    pub key: Codes,
    /// Of values.
    pub value: Codes,
}

impl Sealed {
    /// All that kernels can read.
    pub const ALL: [Self; 6] = [
        Self::both(Codes::Int8),
        Self::both(Codes::Fp8E4m3),
        Self::both(Codes::Int4),
        Self::both(Codes::Kivi4),
        Self::both(Codes::Kivi2),
        Self { key: Codes::Int8, value: Codes::Int4 },
    ];

    /// Keys and values have the same codes.
    pub const fn both(codes: Codes) -> Self {
        Self { key: codes, value: codes }
    }

    /// The codes of a side.
    pub const fn codes(self, is_key: bool) -> Codes {
        if is_key { self.key } else { self.value }
    }

    /// What kernels are named after.
    pub fn name(self) -> String {
        let [key, value] = [self.key.name(), self.value.name()];
        if key == value { key.into() } else { format!("{key}_{value}") }
    }

    /// Tokens of a chunk of both sides, which is what a warp takes at a time.
    pub const fn chunk(self) -> usize {
        if self.key.bits() == 8 || self.value.bits() == 8 { 32 } else { 64 }
    }

    /// Bytes of a side of a cell of 64 tokens, here and there.
    pub fn bytes(self, dim: usize, is_key: bool) -> usize {
        let codes = self.codes(is_key);
        TOKENS * dim * codes.bits() / 8 + codes.scale_bytes(dim, is_key)
    }
}

impl Codes {
    const fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Fp8E4m3 => "fp8e4m3",
            Self::Int4 => "int4",
            Self::Kivi4 => "kivi4",
            Self::Kivi2 => "kivi2",
        }
    }

    const fn bits(self) -> usize {
        match self {
            Self::Int8 | Self::Fp8E4m3 => 8,
            Self::Int4 | Self::Kivi4 => 4,
            Self::Kivi2 => 2,
        }
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

    /// The bit of a word at which its first code starts; the last may go on at the word's lowest bits.
    const fn rotation(self) -> usize {
        if self.bits() == 8 { 0 } else { 2 }
    }

    /// The bits of a word that the device has the other way round: it counts from -128.
    const fn flip(self) -> u32 {
        if matches!(self, Self::Int8) { 0x8080_8080 } else { 0 }
    }

    /// The bit of a code in a row of the host: blocks of 32 channels.
    fn bit_of(self, channel: usize) -> usize {
        let (block, j) = (channel / 32, channel % 32);
        match self.bits() {
            8 => 8 * channel,
            4 => 8 * (block * 16 + j % 16) + j / 16 * 4,
            _ => 8 * (block * 8 + j % 8) + j / 8 * 2,
        }
    }

    /// Visits the elements of a matrix of codes that are laid out as fragments of a left operand: row, column,
    /// the first byte of the word that holds the code, and the bit at which it starts there.
    fn fragments(
        self,
        rows: usize,
        columns: usize,
        mut visit: impl FnMut(usize, usize, usize, usize),
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
                visit(row, column, at, bit);
            }
        }
    }
}

/// Where everything of a side of a cell is on the device and on the host.
#[derive(Debug, Clone)]
pub struct SideLayout {
    format: Codes,
    bytes: usize,
    /// First bytes of the words of codes on the device.
    words: Vec<u32>,
    /// For each code of each word, from its lowest bit on, the bit at which it starts on the host.
    codes: Vec<u32>,
    /// First bytes of the numbers that codes are scaled by, four bytes each: on the device, on the host.
    scales: Vec<[u32; 2]>,
}

impl SideLayout {
    /// The layout of keys or values of `dim` elements.
    pub fn new(sealed: Sealed, dim: usize, is_key: bool) -> Self {
        let (format, chunk) = (sealed.codes(is_key), sealed.chunk());
        let (bytes, row) = (sealed.bytes(dim, is_key), dim * format.bits() / 8);
        // Keys of KIVI have their scales in front; all others behind the codes of each token.
        let (head, tail) = match format.is_kivi() && is_key {
            true => (4 * dim, 0),
            false => (0, (bytes - TOKENS * row) / TOKENS),
        };
        let token = |t: usize| head + t * (row + tail);
        let mut new = Self {
            format,
            bytes,
            words: Vec::new(),
            codes: vec![0; TOKENS * dim],
            scales: Vec::new(),
        };
        let per_word = 32 / format.bits();
        let mut at = 0;
        for first in (0..TOKENS).step_by(chunk) {
            let words = chunk * row / 4;
            let before = new.words.len();
            new.words.extend((0..words).map(|word| (at + 4 * word) as u32));
            let mut place = |t: usize, channel: usize, byte: usize, bit: usize| {
                let code = (bit + 32 - format.rotation()) % 32 / format.bits();
                let host = 8 * token(first + t) + format.bit_of(channel);
                new.codes[(before + byte / 4) * per_word + code] = host as u32;
            };
            match is_key {
                true => format.fragments(chunk, dim, &mut place),
                false => format.fragments(dim, chunk, |r, c, at, bit| place(c, r, at, bit)),
            }
            at += 4 * words;
            let mut scale = |host: usize| {
                new.scales.push([at as u32, host as u32]);
                at += 4;
            };
            match head {
                0 => {
                    // All s, then all m.
                    for part in 0..tail / 4 {
                        (first..first + chunk).for_each(|t| scale(token(t) + row + 4 * part));
                    }
                }
                head => (0..head).step_by(4).for_each(&mut scale),
            }
        }
        new
    }

    /// The bytes for the device of what the quantizer of the host made.
    pub fn to_device(&self, host: &[u8], out: &mut [u8]) {
        assert_eq!([host.len(), out.len()], [self.bytes; 2], "{}", self.format.name());
        let (bits, flip) = (self.format.bits(), self.format.flip());
        let mask = (1 << bits) - 1;
        for (at, codes) in self.words.iter().zip(self.codes.chunks_exact(32 / bits)) {
            let mut word = 0u32;
            for (i, bit) in codes.iter().enumerate() {
                let code = host[*bit as usize / 8] >> (bit % 8);
                word |= (u32::from(code) & mask) << (i * bits);
            }
            let word = (word ^ flip).rotate_left(self.format.rotation() as u32);
            out[*at as usize..][..4].copy_from_slice(&word.to_le_bytes());
        }
        for [at, from] in &self.scales {
            out[*at as usize..][..4].copy_from_slice(&host[*from as usize..][..4]);
        }
    }

    /// The bytes of the host's quantizer: undoes [`Self::to_device`].
    pub fn to_host(&self, device: &[u8], out: &mut [u8]) {
        assert_eq!([device.len(), out.len()], [self.bytes; 2], "{}", self.format.name());
        let (bits, flip) = (self.format.bits(), self.format.flip());
        let mask = (1 << bits) - 1;
        out.fill(0);
        for (at, codes) in self.words.iter().zip(self.codes.chunks_exact(32 / bits)) {
            let word = [0, 1, 2, 3].map(|i| device[*at as usize + i]);
            let word = u32::from_le_bytes(word).rotate_right(self.format.rotation() as u32) ^ flip;
            for (i, bit) in codes.iter().enumerate() {
                let code = (word >> (i * bits) & mask) as u8;
                out[*bit as usize / 8] |= code << (bit % 8);
            }
        }
        for [at, to] in &self.scales {
            out[*to as usize..][..4].copy_from_slice(&device[*at as usize..][..4]);
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
                let (bytes, layout) =
                    (format.bytes(dim, is_key), SideLayout::new(format, dim, is_key));
                let bits = |list: &[u8]| list.iter().map(|byte| byte.count_ones()).sum::<u32>();
                let convert = |host: &[u8]| {
                    let mut out = vec![0xAA; bytes];
                    layout.to_device(host, &mut out);
                    out
                };
                let base = convert(&vec![0; bytes]);
                let host: Vec<u8> = (0..bytes).map(|i| (i * 151 % 253) as u8).collect();
                let mut back = vec![0x55; bytes];
                layout.to_host(&convert(&host), &mut back);
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
