//! Comparisons as numbers: 1 for yes, 0 for no; and a choice by such a number.
//!
//! The loop over all slots must have no branch in its body (see `select`). Written with bits
//! it has none, but the optimizer turns a bit back into a branch as soon as it sees that it is
//! a sign. So on the bpf target the one instruction that makes the bit is hidden from it.
//! What was tried and failed: `core::hint::black_box` (a store and a load each time), an empty
//! assembler line (the kernel refuses the object: "Invalid line_info"), and masks of all ones
//! (the verifier of Linux 6.18 follows `mask & constant` as two paths, so 2^slots of them).

/// 1 if the number, taken as signed, is negative; else 0.
#[inline(always)]
pub(crate) fn negative(number: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut bit = number;
        // SAFETY: one arithmetic instruction on a register of its own.
        unsafe { core::arch::asm!("{0} >>= 63", inout(reg) bit, options(pure, nomem, nostack)) };
        bit
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        number >> 63
    }
}

/// `number & mask`, also where the optimizer knows that the mask changes nothing, and the verifier
/// would not: that of Linux 6.1 forgets all about a number in an OR of 32 bits, which an addition
/// becomes whose operands share no bit.
#[inline(always)]
pub(crate) fn masked(number: u64, mask: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut low = number;
        // SAFETY: one arithmetic instruction on a register of its own.
        unsafe {
            core::arch::asm!("{0} &= {1}", inout(reg) low, in(reg) mask, options(pure, nomem, nostack))
        };
        low
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        number & mask
    }
}

/// 1 if `a < b`. Both must be below 2^63.
#[inline(always)]
pub(crate) fn below(a: u64, b: u64) -> u64 {
    negative(a.wrapping_sub(b))
}

/// 1 if `a != b`. Both must be below 2^63.
#[inline(always)]
pub(crate) fn differ(a: u64, b: u64) -> u64 {
    below(0, a ^ b)
}

/// 1 for `true`.
#[inline(always)]
pub(crate) fn when(yes: bool) -> u64 {
    negative(u64::from(yes).wrapping_neg())
}

/// `yes` if the bit is 1, `no` if it is 0.
#[inline(always)]
pub(crate) fn either(bit: u64, yes: u64, no: u64) -> u64 {
    no.wrapping_add(yes.wrapping_sub(no).wrapping_mul(bit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bits_agree_with_comparisons(a in 0u64..1 << 63, b in 0u64..1 << 63) {
            prop_assert_eq!(below(a, b) == 1, a < b);
            prop_assert_eq!(below(a, b) == 0, a >= b);
            prop_assert_eq!(differ(a, b) == 1, a != b);
            prop_assert_eq!(differ(a, a), 0);
        }

        #[test]
        fn either_chooses(yes: u64, no: u64) {
            prop_assert_eq!((either(1, yes, no), either(0, yes, no)), (yes, no));
        }
    }

    #[test]
    fn a_mask_leaves_the_low_bits() {
        assert_eq!(masked(0x1234, 0xff), 0x34);
    }

    #[test]
    fn a_bool_is_one_or_zero() {
        assert_eq!((when(true), when(false)), (1, 0));
    }
}
