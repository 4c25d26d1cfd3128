// Behind the kernel, whose name is KERNEL: every rank makes its calls one after another, the ranks as they come.
static const Args *cpu_args[64];  // the call that each rank is in
static void cpu_begin() {
    KERNEL(*cpu_args[RANK]);
    cpu::now->ended = true;
    cpu::pass();
}

// args: [world][calls].  Returns 0; 1 where a kernel gave up on a peer, 2 where nothing had ended after `limit` steps.
extern "C" int run(int world, int calls, const int *grids, int threads, const Args *args, unsigned seed, i64 limit) {
    using namespace cpu;
    chance.seed(seed), cpu::threads = threads, trapped = 0;
    std::vector<std::vector<Fibre>> every(world);
    std::vector<std::vector<Block>> blocks(world);
    std::vector<int> call(world, -1);
    std::vector<double> pace(world);
    for (auto &p : pace) p = pow(10.0, -1.5 * (chance() % 1000) / 1000);
    std::discrete_distribution<int> rank_of(pace.begin(), pace.end());
    int left = world;
    auto next = [&](int r) {
        if (++call[r] == calls) { left--; every[r].clear(); return; }
        cpu_args[r] = &args[r * calls + call[r]];
        blocks[r].assign(grids[r * calls + call[r]], Block());
        every[r].resize(blocks[r].size() * threads);
        for (size_t i = 0; i < every[r].size(); i++) {
            Fibre &f = every[r][i];
            f.stack.resize(1 << 15), f.began = f.ended = false, f.barrier = nullptr, f.rank = r, f.block = &blocks[r][i / threads];
            f.thread.x = i % threads, f.number.x = i / threads, f.grid.x = blocks[r].size();
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
            makecontext(&f.context, cpu_begin, 0);
        }
    };
    for (int r = 0; r < world; r++) next(r);
    for (i64 step = 0; left; step++) {
        if (step == limit) return 2;
        const int r = rank_of(chance);
        if (every[r].empty()) continue;
        Fibre &f = every[r][chance() % every[r].size()];
        if (!f.late.empty() && (f.ended || chance() % 2)) {
            for (int n = 1 + chance() % 4; n && !f.late.empty(); n--) arrive(f);
        } else if (!f.ended) {
            go_on(f);
            if (trapped) return 1;
        }
        if (f.ended && f.late.empty()) {
            bool all = true;
            for (auto &other : every[r]) all &= other.ended && other.late.empty();
            if (all) next(r);
        }
    }
    return 0;
}
