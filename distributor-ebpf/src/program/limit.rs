//! The limits of the service as a whole and of each source: at the SYN, at the end of the handshake,
//! when one is handed over, and when it closes.
//!
//! What `select` calls are global functions that take and give plain numbers: the verifier checks
//! each of them once, and not once for each way to it. Nothing here runs for a service without
//! such limits.

use distributor_ebpf::{
    contract::{EXEMPT, FLAG_LIMITED, LIMIT_MAX, Limits, Outcome, Over, Plan, Source, WAYS},
    rate,
    source::{self, LOCKED, NOWHERE},
    word::{self, Place},
};

use crate::maps::{self, Loads, Sources, count};

/// What came of asking for a place or a token.
pub(crate) const TAKEN: u64 = 0;
const OVER_CONNECTIONS: u64 = 1;
const OVER_RATE: u64 = 2;
/// There is a place, but not for a reservation: too many handshakes are under way.
const CROWDED: u64 = 3;
/// There is no place in the table for this source.
const UNKNOWN: u64 = 4;

/// How a number of connections changes.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Change {
    Reserve,
    /// The same of an established connection, which needs no reservation.
    Take,
    GiveBackReserved,
    GiveBackTaken,
    Establish,
    Close,
}

/// What becomes of a new connection, as far as the limits here are concerned.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Admission {
    Granted,
    WaitServiceLimit,
    WaitServiceRate,
    RefusedServiceLimit,
    RefusedServiceRate,
    RefusedSourceLimit,
    RefusedSourceRate,
}

impl Admission {
    /// Why it is refused.
    #[inline(always)]
    pub(crate) fn refused(code: u64) -> Option<Outcome> {
        Some(match code {
            code if code == Self::RefusedServiceLimit as u64 => Outcome::RefusedServiceLimit,
            code if code == Self::RefusedServiceRate as u64 => Outcome::RefusedServiceRate,
            code if code == Self::RefusedSourceLimit as u64 => Outcome::RefusedSourceLimit,
            code if code == Self::RefusedSourceRate as u64 => Outcome::RefusedSourceRate,
            _ => return None,
        })
    }

    /// Whether it has a place and a token of its source, though it may be refused.
    #[inline(always)]
    pub(crate) fn has_source(code: u64) -> bool {
        code != Self::RefusedSourceLimit as u64 && code != Self::RefusedSourceRate as u64
    }

    /// Why it waits.
    #[inline(always)]
    pub(crate) fn waits(code: u64) -> Option<Outcome> {
        Some(match code {
            code if code == Self::WaitServiceLimit as u64 => Outcome::WaitServiceLimit,
            code if code == Self::WaitServiceRate as u64 => Outcome::WaitServiceRate,
            _ => return None,
        })
    }
}

/// Whether there are any limits here.
#[inline(always)]
pub(crate) fn are_set(plan: &Plan) -> bool {
    plan.flags & FLAG_LIMITED != 0
}

/// What its source lets a new connection of this client do.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn admit(high: u64, low: u64, time: u64) -> u64 {
    let (Some((_, plan)), Some(loads)) = (maps::plan(), maps::loads()) else { return 0 };
    let bits = bits_of(&plan.limits, high, low);
    if bits == 0 {
        return Admission::Granted as u64;
    }
    match change_source(plan, high, low, Change::Reserve as u64 | bits << 8, time) {
        OVER_CONNECTIONS => {
            loads.note_over(Over::SourceConnections, time);
            Admission::RefusedSourceLimit as u64
        }
        OVER_RATE => {
            loads.note_over(Over::SourceRate, time);
            Admission::RefusedSourceRate as u64
        }
        UNKNOWN => {
            count(Outcome::SourceUnknown);
            Admission::Granted as u64
        }
        _ => Admission::Granted as u64,
    }
}

/// What the service as a whole lets it do. With `direct` = 1 it goes to a server if it may, and has its
/// place in the service then; with 0 it waits in any case.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn begin(direct: u64, time: u64) -> u64 {
    let (Some((_, plan)), Some(loads)) = (maps::plan(), maps::loads()) else { return 0 };
    let waits = plan.limits.waits != 0;
    // Who waits in any case gets his place and his token when he is handed over.
    if direct == 0 && waits {
        return Admission::Granted as u64;
    }
    let taken = entered(plan, loads, Change::Reserve as u64, true, time);
    if taken == TAKEN {
        if direct == 0 {
            change_service(Change::GiveBackReserved as u64, time);
        }
        return Admission::Granted as u64;
    }
    match (taken, waits || taken == CROWDED) {
        (OVER_RATE, true) => Admission::WaitServiceRate as u64,
        (OVER_RATE, false) => Admission::RefusedServiceRate as u64,
        (_, true) => Admission::WaitServiceLimit as u64,
        (_, false) => Admission::RefusedServiceLimit as u64,
    }
}

/// Gives back what [`admit`] and [`begin`] took: the place in the service with [`PLACE`] in `what`, its
/// token with [`TOKEN`], and with [`SOURCE`] what it took of its source.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn withdraw(high: u64, low: u64, what: u64, time: u64) -> u64 {
    let (Some((_, plan)), Some(loads)) = (maps::plan(), maps::loads()) else { return 0 };
    let limits = &plan.limits;
    if what & PLACE != 0 {
        change_service(Change::GiveBackReserved as u64, time);
    }
    if what & TOKEN != 0 {
        give_back_token(loads, limits);
    }
    let bits = bits_of(limits, high, low);
    if what & SOURCE != 0 && bits != 0 {
        change_source(plan, high, low, Change::GiveBackReserved as u64 | bits << 8, time);
    }
    0
}

pub(crate) const PLACE: u64 = 1;
pub(crate) const TOKEN: u64 = 2;
pub(crate) const SOURCE: u64 = 4;

/// What a connection that goes to a room after all gives back: its place; and its token, where that is
/// taken by who is handed over.
#[inline(always)]
pub(crate) fn of_who_waits(plan: &Plan) -> u64 {
    if plan.limits.waits != 0 { PLACE | TOKEN } else { PLACE }
}

/// Has a connection of a closing listener enter the service: [`Change::Reserve`] or [`Change::Take`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn enter(what: u64, time: u64) -> u64 {
    let (Some((_, plan)), Some(loads)) = (maps::plan(), maps::loads()) else { return TAKEN };
    entered(plan, loads, what, false, time)
}

/// Takes a place in the service, and a token: those who wait take theirs when they are handed over,
/// and where nobody waits for one, everybody does at his SYN.
#[inline(always)]
fn entered(plan: &Plan, loads: Loads, what: u64, at_syn: bool, time: u64) -> u64 {
    let limits = &plan.limits;
    let place = change_service(what, time);
    if place == OVER_CONNECTIONS {
        loads.note_over(Over::ServiceConnections, time);
        return OVER_CONNECTIONS;
    }
    let takes_token = limits.service.interval != 0 && (limits.waits != 0 || at_syn);
    // Who is to wait gets it later, if those who wait take them.
    if !takes_token || place == CROWDED && limits.waits != 0 {
        return place;
    }
    for _ in 0..TOKEN_TRIES {
        let due = loads.due();
        let Some(next) = rate::take(due, time, limits.service.interval, limits.service.tolerance) else {
            break;
        };
        if loads.swap_due(due, next) {
            return place;
        }
    }
    if place == TAKEN {
        let back = if what == Change::Take as u64 { Change::GiveBackTaken } else { Change::GiveBackReserved };
        change_service(back as u64, time);
    }
    loads.note_over(Over::ServiceRate, time);
    OVER_RATE
}

/// Gives back what [`enter`] took of an established connection.
#[inline(always)]
pub(crate) fn leave(plan: &Plan, loads: Loads, time: u64) {
    change_service(Change::GiveBackTaken as u64, time);
    if plan.limits.waits != 0 {
        give_back_token(loads, &plan.limits);
    }
}

/// Times that another CPU may take a token before us.
const TOKEN_TRIES: usize = 8;

#[inline(always)]
fn give_back_token(loads: Loads, limits: &Limits) {
    for _ in 0..TOKEN_TRIES {
        let due = loads.due();
        if loads.swap_due(due, rate::give_back(due, limits.service.interval)) {
            return;
        }
    }
}

/// Whether somebody who waits may go to a server now, as far as the service is concerned.
#[inline(always)]
pub(crate) fn is_open(plan: &Plan, loads: Loads, time: u64) -> bool {
    let service = &plan.limits.service;
    let used = word::used(word::roll(loads.places(), word::epoch(time)));
    let is_full = service.connections != 0 && used >= most(&plan.limits);
    let needs_token = service.interval != 0 && plan.limits.waits != 0;
    !is_full && (!needs_token || rate::wait(loads.due(), time, service.tolerance) == 0)
}

/// Changes the number of connections of the service, if they are counted.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn change_service(what: u64, time: u64) -> u64 {
    let (Some((_, plan)), Some(loads)) = (maps::plan(), maps::loads()) else { return TAKEN };
    let service = &plan.limits.service;
    let takes = what == Change::Reserve as u64 || what == Change::Take as u64;
    if takes && service.connections == 0 {
        return TAKEN;
    }
    let now = word::epoch(time);
    let (limit, reservable) = (most(&plan.limits), u64::from(service.reservable));
    for _ in 0..CHANGES {
        let old = loads.places();
        let new = match changed(old, now, what, limit, reservable) {
            Some(new) => new,
            None if word::used(word::roll(old, now)) < limit => return CROWDED,
            None => return OVER_CONNECTIONS,
        };
        if loads.swap_places(old, new) {
            loads.note_service_expired(&plan.limits, old, time);
            return TAKEN;
        }
    }
    // As for a server's word: at least the active count, by an addition that needs no luck.
    count(Outcome::WordContended);
    let active = word::active(loads.places());
    if what == Change::Establish as u64 && active < word::ACTIVE_MAX {
        loads.add(maps::Sum::Places, 1);
    } else if (what == Change::Close as u64 || what == Change::GiveBackTaken as u64) && active > 0 {
        loads.add(maps::Sum::Places, -1);
    }
    if takes { OVER_CONNECTIONS } else { TAKEN }
}

/// The most connections that may be counted for the service, if it has a limit.
#[inline(always)]
fn most(limits: &Limits) -> u64 {
    u64::from(limits.service.connections.saturating_sub(limits.earlier))
}

/// Times that a word may change under us.
const CHANGES: usize = 16;

/// The word after a change; `None` if there is no place.
#[inline(always)]
fn changed(word: u64, now: u64, what: u64, limit: u64, reservable: u64) -> Option<u64> {
    Some(if what == Change::Reserve as u64 {
        return word::take(word, now, Place::Reserved, limit, reservable);
    } else if what == Change::Take as u64 {
        return word::take(word, now, Place::Active, limit, reservable);
    } else if what == Change::GiveBackReserved as u64 {
        word::give_back(word, now, Place::Reserved)
    } else if what == Change::GiveBackTaken as u64 {
        word::give_back(word, now, Place::Active)
    } else if what == Change::Establish as u64 {
        word::establish(word, now)
    } else {
        word::close(word, now)
    })
}

/// The bits of this address that tell its source; 0 if it has none.
#[inline(always)]
fn bits_of(limits: &Limits, high: u64, low: u64) -> u64 {
    let bits = if source::is_mapped(high, low) { limits.bits_ipv4 } else { limits.bits_ipv6 };
    if bits == 0 {
        return 0;
    }
    for number in 0..EXEMPT {
        if number as u32 >= limits.exempt_count {
            break;
        }
        let exempt = &limits.exempt[number];
        let (high, low) = source::key(high, low, exempt.bits);
        if exempt.high == high && exempt.low == low {
            return 0;
        }
    }
    u64::from(bits)
}

/// Changes what a source has. `what` is a [`Change`], and the bits of the address << 8. A reservation
/// comes with a token, and goes with it.
#[inline(always)]
fn change_source(plan: &Plan, high: u64, low: u64, what: u64, time: u64) -> u64 {
    for _ in 0..SOURCE_TRIES {
        let place = place_of(high, low, what, time);
        if place == NOWHERE {
            return UNKNOWN;
        }
        let done = change_at(place, high, low, what, time);
        if done == ANOTHER {
            continue;
        }
        let is_reservation =
            what & 0xff == Change::Reserve as u64 || what & 0xff == Change::GiveBackReserved as u64;
        if done != TAKEN || plan.limits.source.interval == 0 || !is_reservation {
            return done;
        }
        return source_token(place, what & 0xff, time);
    }
    UNKNOWN
}

/// The same for `track`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn of_source(high: u64, low: u64, what: u64, time: u64) -> u64 {
    let Some((_, plan)) = maps::plan() else { return UNKNOWN };
    change_source(plan, high, low, what, time)
}

/// Times that a place in the table may become another source's.
const SOURCE_TRIES: usize = 4;

/// A place in the table as one number: its bucket << 8, and its way.
#[inline(always)]
fn at(place: u64) -> (Option<Sources>, u64) {
    (maps::sources((place >> 8) as u32), place & (WAYS as u64 - 1))
}

/// The place of a source in the table; if it has none and needs one, one that was free. [`NOWHERE`] if
/// it has none after all. (No place is that number: its bits stand apart from those of a way.)
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn place_of(high: u64, low: u64, what: u64, time: u64) -> u64 {
    let Some((_, plan)) = maps::plan() else { return NOWHERE };
    let now = word::epoch(time);
    let key = source::key(high, low, what >> 8 & 0xff);
    let is_new = what & 0xff == Change::Reserve as u64 || what & 0xff == Change::Establish as u64;
    let bucket = source::bucket(key, plan.limits.seed) & u64::from(plan.limits.buckets);
    let Some(sources) = maps::sources(bucket as u32) else { return NOWHERE };
    // What we have locked, and its word. (Nothing in this loop goes on with the next round by itself: on
    // Linux 6.1 the verifier lets no instruction but a jump lead back.)
    let (mut held, mut before) = (NOWHERE, 0);
    for _ in 0..LOOKS {
        let (way, locked) = source::find(|way| sources.read(way), key);
        if held != NOWHERE {
            // Two who look for the same source may have locked a place each: then at least one of them
            // sees the other, and steps back.
            if way == NOWHERE && locked == 1 {
                sources.name(held, key.0, key.1);
                sources.swap_word(held, LOCKED, word::empty(now));
                return bucket << 8 | held;
            }
            sources.swap_word(held, LOCKED, before);
            held = NOWHERE;
        }
        if way != NOWHERE {
            return bucket << 8 | way;
        }
        // One that is locked may be the one that we look for.
        if locked == 0 {
            if !is_new {
                return NOWHERE;
            }
            let free = source::vacant(|way| sources.read(way), now, time);
            if free == NOWHERE {
                return NOWHERE;
            }
            before = sources.word(free);
            let place = Source { word: before, ..sources.read(free as usize) };
            if source::is_free(&place, now, time) && sources.swap_word(free, before, LOCKED) {
                held = free;
            }
        }
    }
    if held != NOWHERE {
        sources.swap_word(held, LOCKED, before);
    }
    NOWHERE
}

/// Times that a bucket is looked at for one connection.
const LOOKS: usize = 5;

/// The place is another source's now.
const ANOTHER: u64 = 5;

/// Changes the word at a place, if it is that of this source.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn change_at(place: u64, high: u64, low: u64, what: u64, time: u64) -> u64 {
    let (Some((_, plan)), (Some(sources), way)) = (maps::plan(), at(place)) else { return UNKNOWN };
    let ceiling = &plan.limits.source;
    let now = word::epoch(time);
    let key = source::key(high, low, what >> 8 & 0xff);
    let what = what & 0xff;
    let has_limit = ceiling.connections != 0;
    let limit = u64::from(if has_limit { ceiling.connections } else { LIMIT_MAX });
    let reservable = u64::from(if has_limit { ceiling.reservable } else { LIMIT_MAX });
    for _ in 0..CHANGES {
        let seen = sources.word(way);
        // After the word: see `Sources::word`.
        let there = sources.read(way as usize);
        if seen == LOCKED || there.high != key.0 || there.low != key.1 {
            return ANOTHER;
        }
        let Some(new) = changed(seen, now, what, limit, reservable) else { return OVER_CONNECTIONS };
        if sources.swap_word(way, seen, new) {
            return TAKEN;
        }
    }
    count(Outcome::WordContended);
    if what == Change::Close as u64 {
        // By an addition, which needs no luck.
        sources.add(way, -1);
        return TAKEN;
    }
    UNKNOWN
}

/// Takes a token of the source at this place, which holds a reservation; without one, that is given
/// back. Or gives a token back.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn source_token(place: u64, what: u64, time: u64) -> u64 {
    let (Some((_, plan)), (Some(sources), way)) = (maps::plan(), at(place)) else { return UNKNOWN };
    let ceiling = &plan.limits.source;
    for _ in 0..TOKEN_TRIES {
        let due = sources.due(way);
        let next = if what == Change::Reserve as u64 {
            match rate::take(due, time, ceiling.interval, ceiling.tolerance) {
                Some(next) => next,
                None => break,
            }
        } else {
            rate::give_back(due, ceiling.interval)
        };
        if sources.swap_due(way, due, next) {
            return TAKEN;
        }
    }
    if what != Change::Reserve as u64 {
        return TAKEN;
    }
    for _ in 0..TOKEN_TRIES {
        let seen = sources.word(way);
        let back = word::give_back(seen, word::epoch(time), Place::Reserved);
        if sources.swap_word(way, seen, back) {
            break;
        }
    }
    OVER_RATE
}

/// The handshake of a connection is complete. By which bits it is counted for its source from now on;
/// 0 if it is not.
#[inline(always)]
pub(crate) fn established(plan: &Plan, (high, low): (u64, u64), time: u64) -> u32 {
    let bits = bits_of(&plan.limits, high, low);
    if bits == 0 {
        return 0;
    }
    if of_source(high, low, Change::Establish as u64 | bits << 8, time) == TAKEN {
        return bits as u32;
    }
    count(Outcome::SourceUnknown);
    0
}

/// A connection that is counted for its source by these bits is gone.
#[inline(always)]
pub(crate) fn closed(bits: u32, (high, low): (u64, u64), time: u64) {
    of_source(high, low, Change::Close as u64 | u64::from(bits) << 8, time);
}
