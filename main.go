// Duxcore-daemon runs customers' services on one machine of a hosting company.
//
// The company's core calls it over HTTP. A service is one Docker container and one
// directory on the host, its bind directory. All state is in the bind root (see services)
// and in the engine's images, so the daemon can be killed at any instant. It holds
// the engine's socket: whoever controls the daemon is root on the machine.
//
//   - The core is trusted: whoever has its key can run any image and publish any port, but
//     cannot mount a host directory other than a service's own, get a privilege, or reach a
//     container that this daemon did not create. A request without the key gets no further
//     than the key check.
//   - Customers are not trusted. They control what is in their container and in their bind
//     directory; the daemon follows no links there.
//   - The server behind a bind_contents URL is not trusted. It decides what is in that one
//     bind directory, and cannot make the daemon connect to an internal address.
//   - The engine is trusted; its availability is not.
//
// Read main.go, server.go (whose route table is the table of contents), auth.go, listener.go, services.go,
// console.go, stats.go, images.go, lifecycle.go, spec.go, containers.go, engine.go, binds.go, fetch.go,
// archive.go, tar.go, wire.go, errors.go. Callers come before callees, except that lifecycle.go calls images
// and stats through fields of services.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"
)

// config holds the values of the flags. Sizes are in bytes.
type config struct {
	containerSettings
	addr          string // TCP address to listen on
	coreKeyPath   string
	tlsCert       string // PEM file; empty for plain HTTP
	tlsKey        string
	createTimeout time.Duration // for one create or PUT, one import by the engine, or one delete
	fetchAllow    []netip.Prefix
	maxBindBytes  int64 // of a bind_contents stream, compressed and decompressed
	maxBindFiles  int64 // entries in one
	maxImageBytes int64 // of one uploaded image
	logLevel      slog.Level
	logFormat     string // text or json
	version       bool
	dockerHost    string   // set by tests; if empty, DOCKER_HOST decides
	timeouts      timeouts // constants, which tests shorten
	preauthSlots  int      // limit on unauthenticated connections; set by tests
}

func main() {
	cfg, err := parseConfig(os.Args[1:], os.Environ(), os.Stdout)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	if cfg.version {
		fmt.Println(version())
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)  // restores the default action, so that a second signal kills the daemon
	signal.Ignore(syscall.SIGHUP) // many administrators send it to mean "reload"
	options := &slog.HandlerOptions{Level: cfg.logLevel}
	log := slog.New(slog.NewTextHandler(os.Stderr, options))
	if cfg.logFormat == "json" {
		log = slog.New(slog.NewJSONHandler(os.Stderr, options))
	}
	if err := run(ctx, cfg, log, func(net.Addr) {}); err != nil {
		log.Error("exiting", "err", err)
		os.Exit(1)
	}
}

// run serves until ctx is done, then lets the operations in progress finish and returns nil.
// It calls listening with the bound address before the first request is accepted.
func run(ctx context.Context, cfg config, log *slog.Logger, listening func(net.Addr)) error {
	tlsConfig, err := cfg.tlsConfig()
	if err != nil {
		return fmt.Errorf("cannot use the certificate: %w", err)
	}
	engine, err := newEngine(cfg.dockerHost)
	if err != nil {
		return fmt.Errorf("cannot use the engine's address: %w", err)
	}
	defer func() { engine.api().Close() }()
	// First, so that a start that fails because the port is taken leaves nothing behind.
	listener, err := net.Listen("tcp", cfg.addr)
	if err != nil {
		return err
	}
	defer listener.Close()
	if os.Geteuid() != 0 {
		log.Warn("not root: bind directories get no owners, and what a service writes as root cannot be deleted")
	}
	key, err := loadCoreKey(cfg.coreKeyPath, log)
	if err != nil {
		return err
	}
	binds, err := openBinds(cfg.binds)
	if err != nil {
		return fmt.Errorf("cannot use the bind root: %w", err)
	}
	defer binds.close()

	// Operations in progress get a grace period after ctx is done: see serve.
	life, endLife := context.WithCancel(context.WithoutCancel(ctx))
	var background sync.WaitGroup
	defer background.Wait()
	defer endLife()
	serving, stop := context.WithCancel(ctx)
	defer stop()
	s := newServer(life, serving, cfg, key, engine, binds, log)
	s.services.keepSettled(ctx, &background)
	if tcp, ok := listener.Addr().(*net.TCPAddr); ok && !tcp.IP.IsLoopback() && cfg.tlsCert == "" {
		log.Warn("listening on more than loopback without TLS: the core key can be read on the wire")
	}
	log.Info("listening", "addr", listener.Addr(), "binds", binds.path, "version", version())
	if err := notifyReady(); err != nil {
		log.Warn("cannot tell systemd that the daemon is ready", "err", err)
	}
	listening(listener.Addr())
	return s.serve(serving, stop, listener, tlsConfig)
}

// tlsConfig returns the server's TLS configuration, or nil for plain HTTP.
func (c config) tlsConfig() (*tls.Config, error) {
	if c.tlsCert == "" {
		return nil, nil
	}
	pair, err := tls.LoadX509KeyPair(c.tlsCert, c.tlsKey)
	return &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}}, err
}

// notifyReady tells systemd that the daemon is listening, as sd_notify(3) does. Outside a unit of
// Type=notify there is no NOTIFY_SOCKET, and it does nothing.
func notifyReady() error {
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return nil
	}
	conn, err := net.Dial("unixgram", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write([]byte("READY=1"))
	return err
}

// serve answers requests until serving is done or the listener fails, calls stop, and waits for the
// requests in progress. It closes the listener.
func (s *server) serve(serving context.Context, stop func(), listener net.Listener, tlsConfig *tls.Config) (
	err error) {
	srv := &http.Server{
		Handler:                      s,
		BaseContext:                  func(net.Listener) context.Context { return s.ctx },
		ReadHeaderTimeout:            10 * time.Second,
		IdleTimeout:                  2 * time.Minute,
		MaxHeaderBytes:               12 << 10, // net/http allows 4 KiB on top
		DisableGeneralOptionsHandler: true,     // it would answer "OPTIONS *" without the key
		TLSConfig:                    tlsConfig,
		Protocols:                    new(http.Protocols),
	}
	srv.Protocols.SetHTTP1(true)
	newPreauthConns(s.preauthSlots, s.rejected).configure(srv)
	defer srv.Close()
	failed := make(chan error, 1)
	go func() { // ends when srv is closed
		if tlsConfig != nil {
			failed <- srv.ServeTLS(listener, "", "")
		} else {
			failed <- srv.Serve(listener)
		}
	}()
	select {
	case err = <-failed: // for example, accept(2) failed with ENOMEM
	case <-serving.Done():
	}
	stop()
	grace, cancel := context.WithTimeout(s.ctx, s.stopTimeout+15*time.Second)
	defer cancel()
	if srv.Shutdown(grace) != nil {
		err = cmp.Or(err, errors.New("some requests did not end in time; the next start settles what they left"))
	}
	return err
}

// parseConfig applies the environment, then the arguments, which take precedence. Its error has a line for
// each invalid variable, and one for the first invalid argument or else for each value that is out of range.
// For -h it writes the flags to out and returns [flag.ErrHelp].
func parseConfig(args, environ []string, out io.Writer) (config, error) {
	c := config{containerSettings: containerSettings{stopTimeout: 30 * time.Second},
		createTimeout: 30 * time.Minute, preauthSlots: defaultPreauthSlots(),
		timeouts: timeouts{jsonBody: 30 * time.Second, engineRead: 30 * time.Second, clientWrite: 30 * time.Second,
			uploadStall: time.Minute, statsFrame: 2 * time.Minute, statsIdle: 30 * time.Second,
			settle: 2 * time.Minute, settleInterval: time.Minute}}
	fs := flag.NewFlagSet("duxcore-daemon", flag.ContinueOnError)
	fs.SetOutput(io.Discard) // main prints the error
	c.defineFlags(fs)
	errs := applyEnvironment(fs, environ)
	fs.BoolVar(&c.version, "version", false, "print the version and exit") // has no variable
	err := fs.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		fs.SetOutput(out)
		fmt.Fprintln(out,
			"duxcore-daemon runs customers' services in Docker containers, driven over HTTP by the core.\n"+
				"Each flag but -version has an environment variable: -max-image-bytes is DUXCORE_MAX_IMAGE_BYTES. "+
				"A flag takes precedence.")
		fs.PrintDefaults()
		return c, err
	}
	if fs.NArg() > 0 && err == nil {
		err = fmt.Errorf("%q is not a flag", fs.Arg(0))
	}
	if err == nil { // otherwise not all arguments were parsed
		errs = append(errs, c.validate()...)
	}
	return c, errors.Join(append(errs, err)...)
}

// defineFlags defines all flags that have a variable in the environment.
func (c *config) defineFlags(fs *flag.FlagSet) {
	fs.StringVar(&c.addr, "addr", ":8000", "TCP address to listen on")
	fs.StringVar(&c.coreKeyPath, "corekey", "corekey.bin", "file with the binary core key; created when missing")
	fs.StringVar(&c.binds, "binds", "binds", "directory of the bind directories; created when missing")
	fs.StringVar(&c.tlsCert, "tls-cert", "", "PEM file with the certificate chain; needs -tls-key")
	fs.StringVar(&c.tlsKey, "tls-key", "", "PEM file with the certificate's key; needs -tls-cert")
	fs.StringVar(&c.network, "network", "",
		"engine network that services join; empty for the engine's default bridge")
	fs.Int64Var(&c.pidsLimit, "pids-limit", 2048, "processes and threads that one service may have")
	fs.Var((*duration)(&c.stopTimeout), "stop-timeout",
		"`time` between the stop signal and SIGKILL when a service stops")
	fs.Var((*duration)(&c.createTimeout), "create-timeout",
		"`time` for one create or PUT with its pull and download, one import by the engine, or one delete")
	const fetchAllow = "non-public networks (CIDR, comma-separated) that bind_contents may be downloaded from"
	fs.Func("fetch-allow", fetchAllow, func(text string) error {
		c.fetchAllow = nil
		for field := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == ',' }) {
			prefix, err := netip.ParsePrefix(strings.TrimSpace(field))
			if err != nil {
				return err
			}
			c.fetchAllow = append(c.fetchAllow, prefix)
		}
		return nil
	})
	fs.Int64Var(&c.maxBindBytes, "max-bind-bytes", 10<<30, "bytes that a bind_contents archive may unpack to")
	fs.Int64Var(&c.maxBindFiles, "max-bind-files", 250_000, "entries that a bind_contents archive may have")
	fs.Int64Var(&c.maxImageBytes, "max-image-bytes", 16<<30, "bytes that an uploaded image may have")
	fs.TextVar(&c.logLevel, "log-level", slog.LevelInfo,
		"debug, info, warn or error; successful reads are debug")
	fs.StringVar(&c.logFormat, "log-format", "text", "text or json")
}

// applyEnvironment sets the flags whose variable is in the environment. A variable that is not a flag's is an
// error, as a mistyped flag is.
func applyEnvironment(fs *flag.FlagSet, environ []string) (errs []error) {
	for _, variable := range environ {
		twin, text, _ := strings.Cut(variable, "=")
		name, ours := strings.CutPrefix(twin, "DUXCORE_")
		if !ours {
			continue
		}
		f := fs.Lookup(strings.ToLower(strings.ReplaceAll(name, "_", "-")))
		if f == nil || name != strings.ToUpper(name) {
			errs = append(errs, fmt.Errorf("%s is not a variable of this program: see -h", twin))
		} else if err := f.Value.Set(text); err != nil {
			errs = append(errs, fmt.Errorf("invalid value %q of %s: %w", text, twin, err))
		}
	}
	return errs
}

// duration is the value of a flag. Its error gives examples, unlike that of [flag.Duration].
type duration time.Duration

func (d *duration) String() string { return time.Duration(*d).String() }

func (d *duration) Set(text string) error {
	parsed, err := time.ParseDuration(text)
	if err != nil {
		return errors.New("must be a time with its unit, such as 30s or 5m")
	}
	*d = duration(parsed)
	return nil
}

// validate returns one error for each value that is out of range.
func (c config) validate() (all []error) {
	refuse := func(wrong bool, text string) {
		if wrong {
			all = append(all, errors.New(text))
		}
	}
	refuse(c.addr == "", "-addr: must be host:port") // net.Listen would choose a random port
	refuse((c.tlsCert == "") != (c.tlsKey == ""), "-tls-cert and -tls-key go together")
	refuse(c.network == "host" || strings.HasPrefix(c.network, "container:"),
		"-network: services may not share the network of the host or of a container")
	refuse(c.logFormat != "text" && c.logFormat != "json", "-log-format: must be text or json")
	refuse(c.pidsLimit < 1, "-pids-limit: must be at least 1")
	refuse(c.stopTimeout < time.Second, "-stop-timeout: must be at least 1s")
	refuse(c.createTimeout < time.Second, "-create-timeout: must be at least 1s")
	refuse(c.maxBindBytes < 1, "-max-bind-bytes: must be at least 1")
	refuse(c.maxBindFiles < 1, "-max-bind-files: must be at least 1")
	refuse(c.maxImageBytes < 1, "-max-image-bytes: must be at least 1")
	return all
}

// stamp is the version, which packaging/build sets with -ldflags -X. It is empty after a plain go build.
var stamp string

// versionNumber returns the stamp, or else the version that the go command recorded.
func versionNumber() string {
	build, ok := debug.ReadBuildInfo()
	if !ok {
		return cmp.Or(stamp, "unknown")
	}
	return cmp.Or(stamp, build.Main.Version)
}

// version returns the line that -version prints.
func version() string {
	return fmt.Sprintf("duxcore-daemon %s %s %s/%s",
		versionNumber(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
