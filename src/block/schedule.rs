//! Help for schedulers, as pure functions: whom to admit next, whom to preempt, which layers fit.
//! An engine may use or ignore them.

/// A request that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// Blocks of its prompt that are cached now.
    pub cached_blocks: u32,
    /// Blocks that it needs besides.
    pub needed_blocks: u32,
    /// Whose it is.
    pub tenant: u32,
    /// Microseconds that it has waited.
    pub waited: u64,
}

/// A sequence that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Running {
    /// Blocks that become available if it goes: those that nobody shares.
    pub own_blocks: u32,
    /// Tokens to compute again if it comes back without its blocks.
    pub tokens: u32,
    /// Sequences of lower priority go first.
    pub priority: u32,
    /// When it was admitted; among equals the youngest goes first.
    pub admitted: u64,
}

/// The order in which to admit `waiting`, as indices: who has waited `patience` or longer first,
/// the longest waits before shorter ones, so that nobody starves; then tenants in turn, so that none
/// takes all; within a tenant the longest cached prefix first, because it may be gone later.
pub fn admission_order(waiting: &[Waiting], patience: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..waiting.len() as u32).collect();
    let of = |index: &u32| waiting[*index as usize];
    let is_late = |index: &u32| of(index).waited >= patience;
    order.sort_by_key(|index| {
        let it = of(index);
        let within = if is_late(index) { 0 } else { u32::MAX - it.cached_blocks };
        (!is_late(index), within, u64::MAX - it.waited, *index)
    });
    let late = order.iter().take_while(|index| is_late(index)).count();
    // The n-th request of every tenant comes before the n+1-th of any.
    let mut turns = std::collections::HashMap::new();
    let mut rest: Vec<(usize, u32)> = order[late..]
        .iter()
        .map(|index| {
            let turn = turns.entry(of(index).tenant).or_insert(0);
            *turn += 1;
            (*turn, *index)
        })
        .collect();
    rest.sort_by_key(|(turn, _)| *turn);
    for (place, (_, index)) in order[late..].iter_mut().zip(rest) {
        *place = index;
    }
    order
}

/// How many of `waiting`, in `order`, fit into `available` blocks. Admission stops at the first that
/// does not fit: letting smaller ones pass would starve it.
pub fn num_admissible(waiting: &[Waiting], order: &[u32], available: usize) -> usize {
    let mut left = available;
    let fits = |index: &&u32| {
        let Some(request) = waiting.get(**index as usize) else { return false };
        match left.checked_sub(request.needed_blocks as usize) {
            Some(rest) => {
                left = rest;
                true
            }
            None => false,
        }
    };
    order.iter().take_while(fits).count()
}

/// Whom of `running` to preempt so that `needed` blocks become available, as indices in the order of
/// going; `None` if even all of them do not free as many. The lowest priority goes first, then the
/// youngest; who is not needed in the end stays.
pub fn preemption(running: &[Running], needed: usize) -> Option<Vec<u32>> {
    let mut order: Vec<u32> = (0..running.len() as u32).collect();
    let of = |index: &u32| running[*index as usize];
    order.sort_by_key(|index| (of(index).priority, u64::MAX - of(index).admitted, *index));
    let (mut victims, mut freed) = (Vec::new(), 0);
    for index in order {
        if freed >= needed {
            break;
        }
        freed += of(&index).own_blocks as usize;
        victims.push(index);
    }
    if freed < needed {
        return None;
    }
    // A late large victim may make early small ones needless: the dearest to compute again stay.
    let mut dearest = victims.clone();
    dearest.sort_by_key(|index| u32::MAX - of(index).tokens);
    for index in dearest {
        let own = of(&index).own_blocks as usize;
        if freed - own >= needed {
            freed -= own;
            victims.retain(|victim| *victim != index);
        }
    }
    Some(victims)
}

/// Which of `num_layers` layers of a prompt keep their blocks on the device when there is room for
/// `available` blocks and each layer needs `per_layer`: as many as fit, spread evenly, so that the
/// others are written out while those are computed. One answer for each layer.
pub fn layers_on_device(num_layers: usize, per_layer: usize, available: usize) -> Vec<bool> {
    let fit = available.checked_div(per_layer).unwrap_or(num_layers).min(num_layers);
    // The layer at which the running share crosses a whole number stays.
    (0..num_layers).map(|layer| (layer + 1) * fit / num_layers > layer * fit / num_layers).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(cached_blocks: u32, tenant: u32, waited: u64) -> Waiting {
        Waiting { cached_blocks, needed_blocks: 4, tenant, waited }
    }

    #[test]
    fn cached_prefixes_go_first_but_nobody_starves() {
        let list = [
            waiting(0, 0, 5),
            waiting(9, 0, 1),
            waiting(5, 0, 2),
            waiting(1, 1, 1),
            waiting(0, 2, 100),
            waiting(0, 2, 300),
        ];
        assert_eq!(admission_order(&list, 100), [5, 4, 1, 3, 2, 0]);
        assert_eq!(admission_order(&list, u64::MAX), [1, 3, 5, 2, 4, 0]);
        assert_eq!(admission_order(&[], 1), Vec::<u32>::new());
    }

    /// However long the queue of prefixes is, everybody is first at last.
    #[test]
    fn a_stream_of_better_requests_delays_nobody_for_ever() {
        let mut poor = waiting(0, 0, 0);
        for step in 0..200 {
            let rich = waiting(100, 0, 0);
            let order = admission_order(&[rich, poor, rich], 50);
            assert_eq!(order[0] == 1, step >= 50, "step {step}");
            poor.waited += 1;
        }
    }

    #[test]
    fn admission_stops_at_the_first_that_does_not_fit() {
        let mut list = [waiting(0, 0, 0); 3];
        list[1].needed_blocks = 10;
        list[2].needed_blocks = 1;
        assert_eq!(num_admissible(&list, &[0, 1, 2], 9), 1);
        assert_eq!(num_admissible(&list, &[0, 1, 2], 15), 3);
        assert_eq!(num_admissible(&list, &[7], 15), 0);
    }

    #[test]
    fn preemption_frees_enough_and_not_more() {
        let running = |own_blocks, tokens, priority, admitted| Running {
            own_blocks,
            tokens,
            priority,
            admitted,
        };
        let list = [
            running(4, 64, 1, 1),
            running(2, 32, 1, 3),
            running(8, 128, 1, 2),
            running(9, 9, 2, 9),
        ];
        assert_eq!(preemption(&list, 2), Some(vec![1]));
        assert_eq!(preemption(&list, 3), Some(vec![2]));
        assert_eq!(preemption(&list, 14), Some(vec![1, 2, 0]));
        assert_eq!(preemption(&list, 24), None);
        assert_eq!(preemption(&list, 0), Some(vec![]));
    }

    #[test]
    fn layers_spread_evenly() {
        let on = |n, per, available| {
            layers_on_device(n, per, available).iter().filter(|on| **on).count()
        };
        assert_eq!((on(8, 10, 35), on(8, 10, 0), on(8, 10, 500), on(8, 0, 0)), (3, 0, 8, 8));
        assert_eq!(layers_on_device(4, 1, 2), [false, true, false, true]);
    }
}
